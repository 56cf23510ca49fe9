"""The command line: `--mode`, one dotted flag per setting, `--config file.yaml`. All mistakes are reported at once."""

import dataclasses
import difflib
import errno
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from finestsam.config import (
    MODES,
    Config,
    build_config,
    find_misfits,
    find_problems,
    flatten_config,
    list_choices,
    list_derived_defaults,
    list_settings,
)
from finestsam.errors import VALUE_ERRORS, Defect, UserError, printable
from finestsam.model.card import read_card
from finestsam.presets import choose_preset, list_preset_defaults, list_presets
from finestsam.removed_settings import drop_removed, explain_removed
from finestsam.runtime.hardware import Hardware, find_hardware
from finestsam.runtime.plain_yaml import parse_yaml, read_yaml
from finestsam.runtime.screen import prepare_screen
from finestsam.runtime.signals import Interrupted, end_with_parent, watch_signals

SHORT_NAMES = {
    "--dataset": "--dataset.path",
    "--download": "--dataset.download",
    "--against": "--evaluate.against",
}
STATES = ("last.ckpt", "last.prev.ckpt")  # of a run, to continue it
MAX_SHOWN_LETTERS = 200  # of a wrong value, in a message
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DESCRIPTION = "Fine-tune Segment Anything on your labelled images, and find their objects in new ones."
USAGE = """
  python -m finestsam --mode train --dataset path [--setting value ...]
  python -m finestsam --mode predict --input img.png [--setting value ...]
  python -m finestsam --mode evaluate --dataset path --model.checkpoint best.pth [--setting value ...]
  python -m finestsam --mode export --model.checkpoint best.pth --export.format onnx [--setting value ...]
  python -m finestsam --mode check --dataset path [--check.samples 12 ...]
  python -m finestsam --mode convert --dataset path --out_dir new/path [--setting value ...]
  python -m finestsam --dataset coco --download coco-val2017"""


def parse_command_line(arguments: list[str]) -> tuple[str, Config]:
    """Return the mode and its settings.

    Later ones win: defaults, those of the preset, the file of --config or of the resumed run, flags.

    Raises:
        UserError: with one line per problem.
        SystemExit: with 0, after --help and --print_config.
    """
    words = _complete_switches([_lengthen(word) for word in arguments])
    if _find_value(words, "--dataset.download") and not _find_value(words, "--mode"):
        words = ["--mode=check", *words]  # --download needs no mode; the downloaded dataset is checked
    parser = _build_parser()
    try:
        parsed = _parse(parser, _with_files_as_flags(_with_config_of_resumed_run(words)))
    except (ArgumentError, *VALUE_ERRORS) as error:
        raise UserError("\n".join(_diagnose(parser, words) or [_first_line(error)])) from None
    values = _flatten_namespace(parsed)
    mode = values.pop("mode", None)
    problems = _check_mode(mode) + find_problems(mode, values)
    if problems:
        raise UserError("\n".join(problems))
    if mode == "train" and values["resume"]:  # may also come from a settings file
        values["resume"] = str(find_run(values["resume"], Path(values["sav_dir"])))
    return mode, build_config(values)


def _parse(parser: ArgumentParser, words: list[str]) -> Namespace:
    """Parse the words. Some defaults depend on the preset, on the kind of labels and on the prompts."""
    _refuse_endless(words)
    known = parser.parse_args([word for word in words if word.partition("=")[0] not in ("--print_config", "--help")])
    values = _flatten_namespace(known)
    preset = _find_preset(values.pop("mode", None), values, wants_help="--help" in words)
    parser.set_defaults({"preset": preset} | list_derived_defaults(values) | list_preset_defaults(preset, values))
    parsed = parser.parse_args(words)
    parsed["preset"] = preset
    return parsed


def _find_preset(mode: str | None, values: dict[str, Any], wants_help: bool) -> str:
    """Return the name of the preset that training takes its defaults from; `auto` chooses by model and device.

    Only torch knows the devices, and importing it takes seconds: help and wrong settings do not wait for it.
    """
    if mode != "train" or wants_help or find_misfits(mode, values):
        return "none"
    if values["preset"] != "auto":
        return values["preset"]
    return choose_preset(_find_type(values), lambda: _find_hardware(values))


def _find_hardware(values: dict[str, Any]) -> Hardware:
    if values["device"] not in ("auto", "gpu", "cuda"):
        return Hardware(values["device"])
    return find_hardware(values["num_devices"], values["num_nodes"])


def _refuse_endless(words: list[str]) -> None:
    """Raise an ArgumentError for a value so large or so deep that reading or printing it takes all memory.

    Each value is parsed as YAML; in a settings file, even a quoted one.
    """
    for word in words:
        try:
            parse_yaml(word.partition("=")[2] if word.startswith("--") else word)
        except Defect as defect:
            if defect.code in ("too_large", "too_deep"):
                raise ArgumentError(None, f"{_shorten(word)}: {defect.message}") from None


def _find_type(values: dict[str, Any]) -> str:
    """Return the model type; for `auto` the type in the card of the given weights, if there is one."""
    if values["model.type"] != "auto" or values["model.checkpoint"] in ("auto", "none"):
        return values["model.type"]
    weights = Path(values["model.checkpoint"])
    card = read_card(weights / "best.pth" if weights.is_dir() else weights)
    return card.model_type if card else "auto"


def main(arguments: list[str] | None = None) -> int:
    """Run one mode and return the exit code.

    Args:
        arguments: None: the arguments of this process, which then belongs to the command alone.
    """
    if arguments is None:
        prepare_screen()
    try:
        with watch_signals(is_command=arguments is None):
            mode, config = parse_command_line(sys.argv[1:] if arguments is None else arguments)
            return _run(mode, config)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"finestsam: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        print(f"finestsam: {error.strerror}: {error.filename or 'on the disk that is written to'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("finestsam: interrupted", file=sys.stderr)
        return error.exit_code if isinstance(error, Interrupted) else 130


def _run(mode: str, config: Config) -> int:
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one of several processes; the first one started it
        end_with_parent()
    if config.dataset.download:
        from finestsam.modes.download import fetch_coco

        fetch_coco(config.dataset.download, Path(config.dataset.path), config.dataset.download_images)
    # Imported here: torch and lightning take seconds, and the output for --help or a mistyped flag must come at once.
    if mode == "train":
        from finestsam.training.train import train as run
    elif mode == "predict":
        from finestsam.modes.predict import predict as run
    elif mode == "evaluate":
        from finestsam.modes.evaluate import evaluate as run
    elif mode == "check":
        from finestsam.modes.check import check as run
    elif mode == "export":
        from finestsam.modes.export import export as run
    else:
        from finestsam.modes.convert import convert as run
    from finestsam.runtime.folders import release_output_folders

    try:
        return run(config)
    finally:
        release_output_folders()


def _build_parser() -> ArgumentParser:
    parser = _Parser(
        prog="python -m finestsam", usage=USAGE, description=DESCRIPTION, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--mode", choices=MODES, help="what to do")
    parser.add_argument("--config", action="config", help="YAML file of settings, such as a run's own config.yaml")
    groups: dict[str, Any] = {}
    for name, entry in list_settings():
        title = name.rpartition(".")[0]
        if title not in groups:
            groups[title] = parser.add_argument_group(title or "general")
        extra = {"nargs": "+", "type": str} if name == "input" else {"type": entry.type}
        default = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()
        groups[title].add_argument(f"--{name}", default=default, help=_describe(name, entry), **extra)
    return parser


class _Parser(ArgumentParser):
    """A parser that always raises its errors, so that `main` can print all of them together."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ArgumentError(None, message)


def _describe(name: str, entry: dataclasses.Field) -> str:
    shorts = [short for short, long in SHORT_NAMES.items() if long == f"--{name}"]
    text = f"({shorts[0]}) " if shorts else ""
    text += entry.metadata["help"]
    if entry.metadata["valid"]:
        text += f"; in {entry.metadata['valid']}"
    if name == "preset":
        text += "".join(f". {preset.name}: {preset.about}; {preset.list_settings()}" for preset in list_presets())
    return text.replace("%", "%%")


def _lengthen(word: str) -> str:
    name, equals, value = word.partition("=")
    return SHORT_NAMES.get(name, name) + equals + value


def _complete_switches(words: list[str]) -> list[str]:
    """Complete flags without a value: `--strict` becomes `--strict=true`, `--resume` becomes `--resume=auto`."""
    kinds = {f"--{name}": entry.type for name, entry in list_settings()}
    switches = {name: "true" for name, kind in kinds.items() if kind in (bool, bool | None)} | {"--resume": "auto"}
    following = [*words, "--"][1:]
    return [
        f"{word}={switches[word]}" if word in switches and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]


def _with_config_of_resumed_run(words: list[str]) -> list[str]:
    resumed = _find_value(words, "--resume")
    if resumed is None or _find_value(words, "--config") is not None or _find_value(words, "--mode") == "predict":
        return words
    folder = find_run(resumed, Path(_find_value(words, "--sav_dir") or Config.sav_dir))
    # A run goes on with what its own file says, and one from before there were presets without any.
    return ["--preset=none", "--config", str(folder / "config.yaml"), *words, "--resume", str(folder)]


def _with_files_as_flags(words: list[str]) -> list[str]:
    """Replace each --config flag by the flags in its file.

    Raises:
        ValueError: a file cannot be read.
    """
    given, remaining = [], iter(words)
    for word in remaining:
        name, equals, path = word.partition("=")
        if name != "--config":
            given.append(word)
            continue
        settings = _read_settings(Path(path if equals else next(remaining, "")))
        given += [flag for setting, value in settings.items() for flag in _as_flag(setting, value)]
    return given


def _read_settings(path: Path) -> dict[str, Any]:
    """Return {dotted name: value} of a settings file. The short names of the command line are allowed too."""
    try:
        content = read_yaml(path)
    except Defect as defect:
        raise ValueError(f"--config {path}: {defect.message}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected names and values, got {type(content).__name__}")
    settings = flatten_config({str(name): value for name, value in content.items()})
    if _is_of_run(path):
        settings, problems = drop_removed(settings)
        if problems:
            raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return {_lengthen(f"--{name}").removeprefix("--"): value for name, value in settings.items()}


def _is_of_run(path: Path) -> bool:
    """Whether a file of settings is what a run has written of its own."""
    beside = (path.parent / name for name in ("split.json", *STATES))
    return path.name == "config.yaml" and any(other.exists() for other in beside)


def find_run(name: str, sav_dir: Path) -> Path:
    """Return the folder of the run to continue: a path, or a name in `sav_dir`, or `auto` for the newest run."""
    if name != "auto":
        folder = Path(name) if Path(name).is_dir() else sav_dir / name
        if not folder.is_dir():
            raise UserError(f"--resume {name}: no such folder, here or in {sav_dir}")
        settings = folder / "config.yaml"
        if not settings.is_file():
            raise UserError(f"--resume {name}: {settings} is missing, so this is not the folder of a run")
        return folder
    # The newest run is the one saved last. It may have no checkpoint yet; then it starts again, since the user does not
    # mean the run before it.
    runs = sorted(sav_dir.glob("*/config.yaml"), key=lambda path: _find_newest_time(path.parent))
    if not runs:
        raise UserError(f"--resume auto: no run in {sav_dir}")
    return runs[-1].parent


def _find_newest_time(run: Path) -> float:
    """Return the time when a run was last saved, or when it began if it was never saved."""
    paths = [run / name for name in (*STATES, "config.yaml")]
    return max(path.stat().st_mtime for path in paths if path.exists())


def _find_value(words: list[str], flag: str) -> str | None:
    for word, following in zip(words, [*words, None][1:], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _check_mode(mode: str | None) -> list[str]:
    return [] if mode in MODES else [f"--mode is missing: one of {', '.join(MODES)}"]


def _flatten_namespace(parsed: Namespace) -> dict[str, Any]:
    known = {name for name, _ in list_settings()} | {"mode"}
    return {name: value for name, value in vars(parsed.as_flat()).items() if name in known}


def _diagnose(parser: ArgumentParser, words: list[str]) -> list[str]:
    """Return every problem of a command line that does not parse, one line each."""
    known = {name for name, _ in list_settings()}
    problems, sound = [], []
    for flag, values in _group_words(words):
        name = flag.removeprefix("--").partition("=")[0]
        if name == "config":
            file_problems, file_values = _diagnose_file(parser, Path(values[0] if values else flag.partition("=")[2]))
            problems += file_problems
            sound += file_values
        elif name not in known | {"mode", "print_config", "help"}:
            problems.append(_unknown(f"unknown flag {flag.partition('=')[0]}", name, "--"))
        else:
            problem = _try_parse(parser, [flag, *values])
            problems += [problem] if problem else []
            sound += [] if problem else [flag, *values]
    parsed = _flatten_namespace(parser.parse_args(sound))
    mode = parsed.pop("mode", None)
    mode_is_given = any(word.partition("=")[0] == "--mode" for word in words)
    return problems + ([] if mode_is_given else _check_mode(mode)) + find_problems(mode, parsed)


def _diagnose_file(parser: ArgumentParser, path: Path) -> tuple[list[str], list[str]]:
    """Return the problems of a settings file, and its sound settings as flags."""
    try:
        settings = _read_settings(path)
    except ValueError as error:
        return [str(error)], []
    known = {name for name, _ in list_settings()} | {"mode"}
    problems = [
        _unknown(f"{path}: unknown setting {name}", name, place=f"{path}: ") for name in settings if name not in known
    ]
    flags = [words for name, value in settings.items() if name in known and (words := _as_flag(name, value))]
    refused = _find_refused(parser, flags)
    problems += [f"{path}: {problem}" for problem in refused.values()]
    return problems, [word for index, words in enumerate(flags) if index not in refused for word in words]


def _find_refused(parser: ArgumentParser, flags: list[list[str]], first: int = 0) -> dict[int, str]:
    """Return {index: problem} of the flags that cannot be parsed.

    A binary search over halves: a run's file has two hundred flags, and parsing each alone is slow.

    Args:
        first: index of the first flag.
    """
    words = [word for flag in flags for word in flag]
    problem = _try_parse(parser, words) if words else None
    if problem is None:
        return {}
    if len(flags) == 1:
        return {first: problem}
    middle = len(flags) // 2
    return _find_refused(parser, flags[:middle], first) | _find_refused(parser, flags[middle:], first + middle)


def _as_flag(name: str, value: Any) -> list[str]:
    if name == "input":
        paths = value if isinstance(value, list) else [value] if value else []
        return [f"--{name}", *map(str, paths)] if paths else []
    if isinstance(value, str):
        return [f"--{name}={value}"]
    return [f"--{name}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"]


def _try_parse(parser: ArgumentParser, words: list[str]) -> str | None:
    """Return what is wrong with one flag and its values, or None."""
    name, equals, value = words[0].removeprefix("--").partition("=")
    try:
        _refuse_endless(words)
        parser.parse_args(words)
    except (ArgumentError, *VALUE_ERRORS):
        given = _shorten(value if equals else " ".join(words[1:]))
        return f"{name} must be {_name_type(name)}, got {given}" if given else f"--{name} needs a value"
    return None


def _shorten(value: str) -> str:
    return printable(value if len(value) <= MAX_SHOWN_LETTERS else f"{value[:MAX_SHOWN_LETTERS]}...")


def _name_type(name: str) -> str:
    if name == "mode":
        return f"one of {', '.join(MODES)}"
    kind = dict(list_settings())[name].type
    if choices := list_choices(kind):
        return f"one of {', '.join(choices)}"
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    return names.get(getattr(kind, "__name__", ""), str(kind).replace("typing.", "").replace("None", "null"))


def _group_words(words: list[str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append((word, []))
        else:
            groups[-1][1].append(word)
    return groups


def _unknown(text: str, name: str, prefix: str = "", place: str = "") -> str:
    """Return what to print of a name that is no setting's.

    Args:
        text: that it is unknown, with the name.
        prefix: of names on the command line.
        place: the beginning of a line about a file.
    """
    if removed := explain_removed(name):
        return f"{place}{prefix}{removed}"
    known = [known_name for known_name, _ in list_settings()] + ["mode", "config", *(s[2:] for s in SHORT_NAMES)]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not nearest:  # as for `--learning_rate`: a correct name without its section
        nearest = [known_name for known_name in known if known_name.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"{text}; did you mean {prefix}{nearest[0]}?" if nearest else f"{text}; see --help"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
