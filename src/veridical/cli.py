"""The command line: one verb for each job. A bad input ends with one clear line and exit status 2.

Options come from the verb's dataclass: flags win over the recipe (`--config`), the recipe over the defaults.
Nothing heavy is imported before the options are known to be good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any

from veridical.config import build, load_recipe
from veridical.errors import ConfigError, VeridicalError, unknown
from veridical.verbs import VERBS

STOPPED = "stopped; what is complete is kept: run the same command again to resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status: 0, 2 for a bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(words)
    except VeridicalError as error:
        return _fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _fail(STOPPED, 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        sys.stderr.close()
        return 0


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from veridical import __version__

        sys.stdout.write(f"veridical {__version__}\n")
        return 0
    if words[1:] in (["-h"], ["--help"]) and words[0] not in VERBS and _jobs(words[0]):
        sys.stdout.write(_overview(f"{words[0]} "))
        return 0
    verb, words = _take_verb(words)
    options = parse(verb, words)
    if options is None:
        return 0

    from veridical import running
    from veridical.console import console

    with console():
        running.RUN[verb](options)
    return 0


def _take_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and the words after it; `probe fit` is `probe`."""
    if words[:2] == ["probe", "fit"]:
        return "probe", words[2:]
    if " ".join(words[:2]) in VERBS:
        return " ".join(words[:2]), words[2:]
    parts = _jobs(words[0])
    if words[0] not in VERBS and not parts:
        raise unknown("verb", words[0], VERBS, "See veridical --help")
    if parts and len(words) > 1 and not words[1].startswith("-"):
        own = ["fit"] if words[0] in VERBS else []
        raise unknown(f"job of veridical {words[0]}:", words[1], [*own, *parts])
    if words[0] not in VERBS:
        raise ConfigError(f"veridical {words[0]} needs a job: {', '.join(parts)}; see veridical --help")
    return words[0], words[1:]


def _jobs(verb: str) -> list[str]:
    """The jobs of a verb that has several."""
    return [each.removeprefix(f"{verb} ") for each in VERBS if each.startswith(f"{verb} ")]


def parse(verb: str, words: Sequence[str]) -> Any:
    """The verb's options from its flags and recipe; None when its help was asked for and shown.

    Raises:
        UnknownNameError: A flag, or a key of the recipe, that the verb doesn't have.
        ConfigError: A value that doesn't fit.
    """
    cls = VERBS[verb]
    words, recipe = _take_recipe(list(words))
    names = [field.name for field in dataclasses.fields(cls)]
    values = load_recipe(recipe) if recipe else {}
    for key in values:
        if key not in names:
            raise unknown(f"key in {recipe}:", key, names)
    _refuse_twice(cls, words)
    start = build(cls, **values)
    return _parse_flags(verb, cls, start, _spell_switches(cls, words))


def _refuse_twice(cls: type, words: Sequence[str]) -> None:
    """A flag for several values that is given twice would silently lose the first ones."""
    several = {
        f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cls) if "tuple" in str(field.type)
    }
    flags = [word.split("=")[0].replace("_", "-") for word in words if re.match(r"--[a-z]", word)]
    for flag in several:
        if flags.count(flag) > 1:
            raise ConfigError(f"{flag} was given twice; give it once, with all its values behind it")


def _parse_flags(verb: str, cls: type, start: Any, words: list[str]) -> Any:
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options, left = tyro.cli(
                cls, default=start, args=words, prog=f"veridical {verb}", return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ConfigError(f"{_complaint(said.getvalue())}; see veridical {verb} --help") from None
    if left:
        flags = [f"--{name.replace('_', '-')}" for name in _shown(cls)]
        kind = "flag" if left[0].startswith("-") else "argument"
        raise unknown(f"{kind} of veridical {verb}:", left[0].split("=")[0], [*flags, "--config", "--help"])
    return build(cls, options)


def _shown(cls: type) -> list[str]:
    """The fields that are flags; those that a verb inherits and does not read are hidden."""
    import tyro

    hints = typing.get_type_hints(cls, include_extras=True)
    return [
        field.name
        for field in dataclasses.fields(cls)
        if tyro.conf.Suppress not in getattr(hints[field.name], "__metadata__", ())
    ]


def _take_recipe(words: list[str]) -> tuple[list[str], str | None]:
    recipe, left = None, []
    rest = iter(words)
    for word in rest:
        if word == "--config":
            recipe = next(rest, None)
            if recipe is None:
                raise ConfigError("--config needs the path of a recipe")
        elif word.startswith("--config="):
            recipe = word.removeprefix("--config=")
        else:
            left.append(word)
    return left, recipe


def _spell_switches(cls: type, words: list[str]) -> list[str]:
    """Lets a switch that also has an automatic setting be written as --name and --no-name."""
    switches = {
        field.name.replace("_", "-") for field in dataclasses.fields(cls) if field.type == "bool | None"
    }
    spelt: list[str] = []
    for here, word in enumerate(words):
        name = word.removeprefix("--").replace("_", "-")
        following = words[here + 1] if here + 1 < len(words) else ""
        if word.startswith("--") and name.removeprefix("no-") in switches and name.startswith("no-"):
            spelt += [f"--{name.removeprefix('no-')}", "False"]
        elif word.startswith("--") and name in switches and following not in ("True", "False", "None"):
            spelt += [word, "True"]
        else:
            spelt.append(word)
    return spelt


def _complaint(box: str) -> str:
    """The first paragraph of tyro's boxed message as one line; the box is drawn in lines or in dashes."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        line = re.sub(r"^[│\s]+|[│\s]+$", "", line)
        if re.match(r"[─╭╰]|-{5,}$", line):
            parts.append([])
        elif line:
            parts[-1].append(line)
    # What stands before the first rule is at most the title.
    said = " ".join(next((part for part in parts[1:] if part), parts[0]))
    refused = re.search(
        r"validation errors? for \S+ (\w+) (.+?) \[type=\w+, input_value=(.*?), input_type", said
    )
    if refused is not None:
        said = f"{refused[1]} = {refused[3]}: {refused[2]}"
    choice = re.match(r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*)\) ?\.$", said)
    if choice is not None:
        said = str(unknown(f"choice for {choice[2]}:", choice[1], re.findall(r"'(.*?)'", choice[3])))
    said = said.split(". Got errors:")[0].rstrip(".")
    return said or "wrong use of the command line"


def _overview(of: str = "") -> str:
    """The verbs with their examples; with `of`, those that begin so."""
    lines = [
        f"usage: veridical {of}{'JOB' if of else 'VERB'} [options]",
        "",
        "Asks a language model what it represents and whether it says what it believes.",
        "",
    ]
    shown = {name: cls for name, cls in VERBS.items() if name.startswith(of)}
    width = max(map(len, shown)) + 2
    for name, cls in shown.items():
        doc = (cls.__doc__ or "").strip().splitlines()
        example = next((line.strip() for line in doc if line.strip().startswith("Example: ")), "")
        lines += [f"  {name:{width}}{doc[0]}", f"  {'':{width}}{example.removeprefix('Example: ')}"]
    lines += [
        "",
        "Every verb takes --config recipe.yaml (flags win) and has its own --help. veridical --version",
        "prints the version. A verb writes config.json, provenance.json and metrics.json beside its output;",
        "config.json is a recipe that runs it again.",
    ]
    return "\n".join(lines) + "\n"


def _fail(line: str, status: int) -> int:
    sys.stderr.write(f"veridical: {line}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
