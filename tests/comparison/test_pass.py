"""The one pass against brute force, one text at a time in float64; against itself; with planted changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparison_oracles import direct_cka, rotated

import veridical as vd
from tiny_models import make
from veridical.comparison.cka import CKA, Products
from veridical.comparison.comparing import site_pairs
from veridical.comparison.directions import Directions
from veridical.comparison.drift import Drift
from veridical.comparison.duo import pair_of
from veridical.comparison.influence import Kept, interval, of_cka, of_procrustes
from veridical.comparison.lens import LensDivergence, MeanDifference
from veridical.comparison.outputs import MEASURES, Outputs
from veridical.comparison.procrustes import procrustes, procrustes_frame
from veridical.comparison.resampling import Resampling
from veridical.comparison.rows import rows_of
from veridical.comparison.streaming import stream
from veridical.pairs import Pairs

THINGS = ["France", "Italy", "gold", "silver", "Rome", "the capital of Italy", "a lie", "truth"]


@pytest.fixture(scope="module")
def pairs():
    rows = []
    for number, thing in enumerate(THINGS):
        for label, said in ((1, " yes"), (0, " not true at all")):
            asked = f"what is {thing}" + "?" * (number % 3)
            rows.append({"pair": f"p{number}", "prompt": asked, "completion": said, "label": label})
    return Pairs.from_rows(rows)


def measured(duo, data, batch_tokens=64, drawn=2, bootstrap=20, seed=0):
    rows = rows_of(duo, data)
    resampling = Resampling(bootstrap, seed=seed)
    sites = site_pairs(duo)
    names = list(sites)
    meters = {
        "outputs": Outputs(duo.vocabulary, resampling),
        "drift": Drift(names, resampling),
        "cka": CKA(names),
        "lens": LensDivergence(duo, names, resampling, drawn),
        "difference": MeanDifference(names, resampling),
        "directions": Directions(names, rows.labels, rows.groups, resampling),
    }
    stream(duo, rows, list(meters.values()), resampling, sites=sites, batch_tokens=batch_tokens)
    return meters, rows, sites, names


def by_hand(duo, rows, sites):
    """Log-probabilities and streams of every text, one at a time."""
    found = []
    for row in rows.rows:
        runs = []
        for model, side in ((duo.policy, 0), (duo.reference, 1)):
            with torch.no_grad():
                run = model.run(model.batch([row.policy]), read=[site[side] for site in sites.values()])
            logs = run.logits[0].double().log_softmax(-1)
            runs.append((logs, [run[site[side]][0].double() for site in sites.values()]))
        found.append((row, runs))
    return found


@pytest.fixture(scope="module")
def planted(duo_of, pairs):
    duo = duo_of(1, dtype=torch.float64)
    return duo, *measured(duo, pairs, drawn=1000)


def test_outputs_equal_brute_force(planted):
    duo, meters, rows, sites, _ = planted
    tokens = {"all": [], "answer": [], "last": []}
    position, offset, by_token, answers = {}, {}, {}, []
    shift = torch.zeros(duo.vocabulary, dtype=torch.float64)
    for row, ((p, _), (q, _)) in by_hand(duo, rows, sites):
        kl = (p.exp() * (p - q)).sum(-1)
        last, whole = len(row.policy) - 1, 0.0
        for at in range(len(row.policy)):
            change = [float("nan")] * 3
            if at < last:
                chosen = [float(logs[at, row.policy[at + 1]]) for logs in (p, q)]
                change = [chosen[0] - chosen[1], *chosen]
            line = [
                float(kl[at]),
                float((q[at].exp() * (q[at] - p[at])).sum()),
                *(float(-(logs[at].exp() * logs[at]).sum()) for logs in (p, q)),
                float(p[at].argmax() == q[at].argmax()),
                *change,
            ]
            tokens["all"].append(line)
            if at == last:
                tokens["last"].append(line)
            if row.first - 1 <= at < last:
                tokens["answer"].append(line)
                whole += float(kl[at])
            position.setdefault(at, []).append(float(kl[at]))
            offset.setdefault(at + 1 - row.first, []).append(float(kl[at]))
            by_token.setdefault(row.policy[at], []).append(float(kl[at]))
        answers.append(whole)
        shift += (p.exp() - q.exp()).mean(0) / len(rows)
    frame = meters["outputs"].frame()
    for region, lines in tokens.items():
        expected = np.array(lines)
        for number, measure in enumerate(MEASURES):
            values = expected[:, number]
            values = values[np.isfinite(values)]
            found = frame[(frame["region"] == region) & (frame["measure"] == measure)]
            assert len(found) == bool(len(values))
            if len(values):
                assert found["value"].item() == pytest.approx(values.mean(), rel=1e-9)
                assert found["tokens"].item() == len(values)
                assert found["low"].item() <= values.mean() <= found["high"].item()
    whole = frame[frame["measure"] == "kl of an answer"]["value"].item()
    assert whole == pytest.approx(np.mean(answers), rel=1e-9)
    table = meters["outputs"].position_frame()
    for axis, expected in (("text", position), ("answer", offset)):
        part = table[(table["axis"] == axis) & (table["measure"] == "kl")].set_index("position")
        near = {at: values for at, values in expected.items() if axis == "text" or -16 <= at < 64}
        assert set(part.index) == set(near)
        for at, values in near.items():
            assert part.loc[at, "value"] == pytest.approx(np.mean(values), rel=1e-9)
    for _, line in meters["outputs"].token_frame(str, least=1).iterrows():
        assert line["kl"] == pytest.approx(np.mean(by_token[line["id"]]), rel=1e-9)
        assert line["count"] == len(by_token[line["id"]])
    shifted = meters["outputs"].shift_frame(str)
    np.testing.assert_allclose(shifted["shift"], shift[shifted["id"].tolist()], rtol=1e-4, atol=1e-8)
    assert shifted["shift"].max() == pytest.approx(float(shift.max()), rel=1e-4)
    kept = meters["outputs"].text_frame(str)
    first = kept[kept["row"] == kept["row"].iloc[0]]
    means = [
        np.mean(((p.exp() * (p - q)).sum(-1)).numpy()) for _, ((p, _), (q, _)) in by_hand(duo, rows, sites)
    ]
    assert kept["row"].iloc[0] == int(np.argmax(means))
    assert first["kl"].mean() == pytest.approx(max(means), rel=1e-9)


def test_representations_equal_brute_force(planted):
    duo, meters, rows, sites, names = planted
    runs = by_hand(duo, rows, sites)
    vectors = {site: [torch.cat([one[side][1][at] for _, one in runs]) for side in range(2)]
               for at, site in enumerate(names)}  # fmt: skip
    drift, cka = meters["drift"].frame(), meters["cka"].frame()
    lens = meters["lens"].frame()
    unembed = [model.model for model in (duo.policy, duo.reference)]
    for at, site in enumerate(names):
        y, x = vectors[site]
        part = drift[drift["site"] == site].set_index("measure")["value"]
        relative = (y - x).norm(dim=1) / x.norm(dim=1)
        turn = 1 - torch.cosine_similarity(x, y, dim=1)
        assert part["relative norm"] == pytest.approx(float(relative.mean()), rel=1e-9)
        assert part["turn"] == pytest.approx(float(turn.mean()), abs=1e-12)
        assert cka["cka"][at] == pytest.approx(direct_cka(y.numpy(), x.numpy()), rel=1e-9)
        with torch.no_grad():
            p, q = (m.lm_head(m.model.norm(v)).log_softmax(-1) for m, v in zip(unembed, (y, x)))
        assert lens["kl"][at] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-8, abs=1e-14)
        torch.testing.assert_close(meters["difference"].means[0, at], (y - x).mean(0))
        ends = torch.tensor([len(row.policy) for row in rows.rows]).cumsum(0) - 1
        torch.testing.assert_close(meters["difference"].means[1, at], (y - x)[ends].mean(0))
        label = torch.from_numpy(rows.labels)
        for side, rows_of_side in enumerate((y, x)):
            last = rows_of_side[ends]
            direction = last[label == 1].mean(0) - last[label == 0].mean(0)
            torch.testing.assert_close(meters["directions"].vectors()[side, at], direction)


def test_a_model_against_itself_is_zero(duo_of, pairs):
    meters, *_, names = measured(duo_of(None), pairs)
    frame = meters["outputs"].frame().set_index(["region", "measure"])["value"]
    for region in ("all", "answer", "last"):
        assert frame[region, "kl"] == 0
        assert frame[region, "reverse kl"] == 0
        assert frame[region, "agreement"] == 1
    assert frame["all", "log-likelihood change"] == 0
    assert (meters["outputs"].position_frame()["value"] == 0).all()
    assert meters["outputs"].shift_frame(str).empty
    change = meters["outputs"].calibration_frame()
    assert (change[change["of"] == "change"]["value"] == 0).all()
    assert (meters["drift"].frame()["value"] == 0).all()
    np.testing.assert_allclose(meters["cka"].frame()["cka"], 1, atol=1e-13)
    distances = procrustes_frame(names, meters["cka"].products)
    np.testing.assert_allclose(distances[["distance", "unrotated"]], 0, atol=1e-12)
    assert (meters["lens"].frame()["kl"] == 0).all()
    assert (meters["difference"].means == 0).all()
    np.testing.assert_allclose(meters["directions"].frame()["cosine"], 1, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_change_in_a_layer_is_localised_to_it(duo_of, pairs, layer):
    meters, *_ = measured(duo_of(layer), pairs)
    drift = meters["drift"].frame()
    norms = drift[drift["measure"] == "relative norm"].set_index("site")["value"]
    before = ["resid_pre.0", *(f"resid_post.{k}" for k in range(layer))]
    assert (norms[before] == 0).all()
    assert norms[f"resid_post.{layer}"] > 0.01
    steps = norms.diff().fillna(0)
    assert steps.idxmax() == f"resid_post.{layer}"
    cka = meters["cka"].frame().set_index("site")["cka"]
    np.testing.assert_allclose(cka[before], 1, atol=1e-13)
    assert cka[f"resid_post.{layer}"] < 0.9999
    lens = meters["lens"].frame().set_index("site")["kl"]
    assert (lens[before] == 0).all()
    assert lens[f"resid_post.{layer}"] > 0


def test_batches_make_no_difference(duo_of, pairs):
    one, *_ = measured(duo_of(1, dtype=torch.float64), pairs, batch_tokens=1)
    many, *_ = measured(duo_of(1, dtype=torch.float64), pairs, batch_tokens=4096)
    for name, columns in (("outputs", ["value", "low", "high"]), ("drift", ["value", "low", "high"]),
                          ("lens", ["kl", "low", "high"]), ("cka", ["cka"])):  # fmt: skip
        left, right = one[name].frame(), many[name].frame()
        np.testing.assert_allclose(left[columns], right[columns], rtol=1e-8, atol=1e-12)


def test_a_rotated_basis_leaves_outputs_and_cka_alone(tokenizer, pairs):
    base = make("llama").double()
    duo = pair_of(*(vd.load(m, tokenizer=tokenizer, check=False) for m in (rotated(base), base)))
    meters, *_, names = measured(duo, pairs)
    frame = meters["outputs"].frame().set_index(["region", "measure"])["value"]
    assert abs(frame["all", "kl"]) < 1e-12
    np.testing.assert_allclose(meters["cka"].frame()["cka"], 1, atol=1e-9)
    distances = procrustes_frame(names, meters["cka"].products)
    assert (distances["distance"] < 1e-8).all()
    assert (distances["unrotated"] > 0.5).all()
    drift = meters["drift"].frame()
    assert (drift[drift["measure"] == "turn"]["value"] > 0.5).all()


def test_intervals_of_cka_and_procrustes_are_those_of_resampled_pairs():
    """The influences of pairs against a bootstrap of pairs with the direct formulas."""
    random = torch.Generator().manual_seed(0)
    pairs, each, width = 60, 6, 5
    shared = torch.randn(pairs, 1, width, generator=random, dtype=torch.float64)
    x = shared + 0.5 * torch.randn(pairs, each, width, generator=random, dtype=torch.float64) + 3
    y = x @ torch.randn(width, width, generator=random, dtype=torch.float64)
    y = y + 0.8 * torch.randn(pairs, each, width, generator=random, dtype=torch.float64) * shared.exp()
    products = Products()
    products.add(x.flatten(0, 1), y.flatten(0, 1))
    kept = Kept(["here"], Resampling(0))
    for group in range(pairs):
        kept.add(one_pair(group, x[group], y[group]))
    drawn = np.random.default_rng(0).integers(0, pairs, (600, pairs))
    for figure, influence in ((Products.cka, of_cka), (lambda p: procrustes(p)[0], of_procrustes)):
        values = []
        for picks in drawn:
            again = Products()
            again.add(x[picks].flatten(0, 1), y[picks].flatten(0, 1))
            values.append(figure(again))
        low, high = interval(figure(products), influence, products, kept, "here")
        assert high - low == pytest.approx(4 * np.std(values), rel=0.2)
    some = Kept(["here"], Resampling(0), memory=20 * 6 * 2 * 5 * 8)
    for group in range(pairs):
        some.add(one_pair(group, x[group], y[group]))
    assert len(some.rows) == 20
    assert len(some.vectors("here")[0]) == 20 * each
    fewer = interval(products.cka(), of_cka, products, some, "here")
    whole = interval(products.cka(), of_cka, products, kept, "here")
    assert fewer[1] - fewer[0] == pytest.approx(whole[1] - whole[0], rel=0.5)


def one_pair(group, x, y):
    """A batch of one pair, of what `Kept` reads of it."""
    return SimpleNamespace(
        groups=np.array([group]), row=torch.zeros(len(x), dtype=torch.long), streams={"here": (x, y)}
    )


def test_intervals_cover_and_shrink(duo_of, pairs):
    """The Poisson bootstrap's spread is that of resampled pairs."""
    duo = duo_of(1, dtype=torch.float64)
    meters, rows, sites, _ = measured(duo, pairs, bootstrap=2000)
    sums, counts = np.zeros(len(THINGS)), np.zeros(len(THINGS))
    for (_, ((p, _), (q, _))), group in zip(by_hand(duo, rows, sites), rows.groups):
        sums[group] += float((p.exp() * (p - q)).sum())
        counts[group] += len(p)
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(sums), (4000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    frame = meters["outputs"].frame()
    line = frame[(frame["region"] == "all") & (frame["measure"] == "kl")].iloc[0]
    assert line["high"] - line["low"] == pytest.approx(
        np.subtract(*np.percentile(means, [97.5, 2.5])), rel=0.2
    )
