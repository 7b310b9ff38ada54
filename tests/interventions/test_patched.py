"""The result of a sweep: table, intervals, figures, saving."""

import numpy as np
import pytest
from test_patch import quiet

import veridical as vd
from veridical.errors import InputError
from veridical.interventions import Patched
from veridical.interventions.bands import bands

CLEAN = [[5, 8, 13, 40], [9, 33, 60], [7, 7, 8, 9], [50, 2, 3, 4]]
CORRUPT = [[5, 9, 13, 41], [9, 44, 61], [8, 7, 8, 8], [51, 2, 7, 4]]


@pytest.fixture(scope="module")
def result(hooked):
    sites = "resid_pre.*, z.*"
    return quiet(
        hooked("llama"), CLEAN, CORRUPT, sites=sites, heads="all", answers=10, wrong=20, bootstrap=200
    )


def test_the_table(result):
    frame = result.to_frame()
    assert len(frame) == 3 * 4 + 3 * 4 * 4
    first = frame[(frame["kind"] == "resid_pre") & (frame["layer"] == 0)]
    assert first["position"].tolist() == ["-4", "-3", "-2", "-1"]
    assert first["examples"].tolist() == [3, 4, 4, 4]
    effects = result.effects
    assert np.allclose(frame["effect"], np.nanmean(effects, 1))
    gap = result.source_values - result.base_values
    there = np.isfinite(effects)
    shares = np.where(there, effects, 0).sum(1) / np.where(there, gap, 0).sum(1)
    assert np.allclose(frame["recovered"], shares)
    moved = frame["effect"] != 0
    assert (frame["effect_low"] <= frame["effect"] + 1e-9)[moved].all()
    assert (frame["effect_high"] >= frame["effect"] - 1e-9)[moved].all()
    assert (frame["effect_high"] > frame["effect_low"])[moved].any()


def test_one_example_has_no_interval(hooked):
    alone = quiet(hooked("llama"), CLEAN[:1], CORRUPT[:1], sites="resid_pre.1", answers=10, wrong=20)
    frame = alone.to_frame()
    assert frame["effect_low"].isna().all()
    assert any("no interval" in line for line in alone.findings())
    assert frame["position"].tolist() == ["0", "1", "2", "3"]
    assert frame["token"].notna().all()


def test_it_comes_back_as_it_was_saved(result, tmp_path):
    result.save(tmp_path / "patched")
    back = Patched.load(tmp_path / "patched")
    assert np.array_equal(back.values, result.values, equal_nan=True)
    assert back.to_frame().equals(result.to_frame())
    assert back.tokens == result.tokens
    assert vd.load_result(tmp_path / "patched").figure().to_json() == result.figure().to_json()


def test_heat_maps(result, hooked):
    figure = result.figure()
    assert len(figure.data) == 2
    stream, heads = figure.data
    assert np.asarray(stream.z, dtype=float).shape == (3, 4)
    assert np.asarray(heads.z, dtype=float).shape == (12, 4)
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert "95 % interval" in stream.customdata[1][3]
    grid = quiet(
        hooked("llama"), CLEAN, CORRUPT, sites="z.*", heads="all", positions="all", answers=10, wrong=20
    ).figure("recovered")
    assert np.asarray(grid.data[0].z, dtype=float).shape == (3, 4)
    assert list(grid.data[0].x) == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match="unknown quantity"):
        result.figure("effects")


def test_absent_cells_are_empty_and_tokens_are_inert(hooked):
    model = hooked("llama")
    texts = ["<b>gold</b> is", "<b>gold</b> or"]
    one = quiet(model, texts[0], texts[1], sites="resid_pre.1", metric="kl")
    assert not any("<b>" in str(label) for label in one.figure().data[0].x)
    section = one.report_section()
    assert section.headline[0][1].startswith(("+", "-"))
    assert "<b>gold" not in one._repr_html_().replace("<b>Patched", "")
    aligned = quiet(model, [[5, 6, 7]], [[5, 7]], sites="resid_pre.1", metric="kl", align="token")
    assert aligned.figure().data[0].z[0][1] is None or np.isnan(aligned.figure().data[0].z[0][1])


def test_bands_are_the_cheapest_partition():
    firsts, work, width, layers = [0, 2, 3, 7, 9], [4, 1, 8, 3, 2], 12, 6
    from itertools import combinations

    from veridical.interventions import bands as module

    def cost(starts, parameters):
        launch = module.LAUNCH["cpu"] / (2 * parameters)
        fixed = module.FORWARD * launch + layers * (launch + module.WEIGHTS["cpu"])
        ends = [*starts[1:], width]
        inside = [
            sum(w for f, w in zip(firsts, work) if start <= f < end) * (width - start)
            for start, end in zip(starts, ends)
        ]
        return fixed * len(starts) + sum(inside)

    for factor in (1, 100, 10000):
        scaled = [w * factor for w in work]
        work_, work = work, scaled
        ways = [(0, *chosen) for n in range(len(firsts)) for chosen in combinations(firsts[1:], n)]
        best = min(cost(way, 5e6) for way in ways)
        assert np.isclose(cost(bands(firsts, work, width, layers, 5_000_000), 5e6), best)
        work = work_
    assert len(bands(firsts, [1] * 5, width, layers, 1000)) == 1
    assert bands(firsts, [1e9] * 5, width, layers, 5_000_000) == firsts
