"""What both commands share: Hydra, with one clear message and exit code for every failure."""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from repnet.config import unknown_key
from repnet.errors import InputError, first_line
from repnet.spec import CONFIGS, choices, unknown_name

BAD_INPUT, REFUSED, INTERRUPTED = 2, 3, 130
FULL_ERROR = "HYDRA_FULL_ERROR"
# Names of errors that explain themselves, beside those of bad input.
_EXPECTED = {
    "NonFiniteLossError",
    "CheckpointWriteError",
    "ExportError",
    "OutOfMemoryError",
    "PermissionError",
}


def run(
    config_name: str,
    job: Callable[[DictConfig], Any],
    explain: Callable[[Exception], str | None] = lambda error: None,
) -> None:
    """Run `job` with the composed config, and exit with the code that says how it ended.

    Exit codes: 0 done, 1 unexpected error, 2 bad input, 3 verification failed, 130 interrupted
    (Ctrl-C, SIGTERM or SIGUSR1).

    A job of a multirun that fails lets the others run; then all failures are told, and the code is
    that of the first. An error is one line; its traceback follows where nobody expected it, or
    where HYDRA_FULL_ERROR=1 asks for it.

    Args:
        config_name: of the file in `configs`.
        job: called with the config.
        explain: returns the message of an error that says too little itself, else None.
    """
    full = traceback_is_wanted()
    os.environ[FULL_ERROR] = "1"  # Hydra raises, instead of printing and exiting with 1
    process = os.getpid()
    errors: list[tuple[str, Exception]] = []

    def report(which: str, error: Exception) -> int:
        message, code, bug = _explained(error, explain)
        if isinstance(error, ConfigCompositionException):
            message = _unknown_key(config_name, message)
        if not hasattr(error, "was_told"):
            _tell(f"error: {which}{' '.join(message.splitlines())}")
            if bug or full:
                traceback.print_exception(error)
        return code

    def guarded(cfg: DictConfig) -> Any:
        if not full:  # processes that the job starts do as the user wants
            os.environ.pop(FULL_ERROR, None)
        try:
            return job(cfg)
        except Exception as error:
            hydra_config = HydraConfig.get()
            several = hydra_config.mode == RunMode.MULTIRUN
            which = f"{' '.join(hydra_config.overrides.task)}: " if several else ""
            if os.getpid() != process:  # a launcher's worker
                report(which, error)
                error.was_told = True  # type: ignore[attr-defined]
                raise  # Hydra brings the first one to the process that sweeps
            errors.append((which, error))  # told below, without what Hydra would print around it
        finally:
            os.environ[FULL_ERROR] = "1"

    interrupted = False
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(guarded)()
    except KeyboardInterrupt:
        interrupted = True
    except Exception as failure:
        own = isinstance(failure, HydraException) or hasattr(failure, "was_told")
        if isinstance(failure, OSError) and failure.filename and not own:  # Hydra's mkdir
            failure = InputError(
                f"the output directory cannot be made: {failure}; pass another hydra.run.dir (with "
                "-m, hydra.sweep.dir)"
            )
        errors.append(("", failure))
    finally:
        if not full:
            os.environ.pop(FULL_ERROR, None)
    codes = [report(which, error) for which, error in errors]
    if interrupted:
        _tell("interrupted")
        sys.exit(INTERRUPTED)
    if codes:
        sys.exit(codes[0])


def traceback_is_wanted() -> bool:
    """Return whether the user asks for the traceback of errors that explain themselves, too."""
    return os.environ.get(FULL_ERROR) == "1"


def _explained(
    error: Exception, explain: Callable[[Exception], str | None]
) -> tuple[str, int, bool]:
    """Return a failure's message, its exit code, and whether nobody expected it."""
    if isinstance(error, HydraException | OmegaConfBaseException | InputError):
        return message_of(error), BAD_INPUT, False
    if str(error).startswith("Config group override must be"):  # Hydra's answer to group=null
        return "a group cannot be set to null: leave it out, or choose none", BAD_INPUT, False
    if message := explain(error):
        return message, 1, False
    code = exit_code(error)
    if code is None:
        return f"unexpected {type(error).__name__}: {first_line(error)}", 1, True
    return str(error), code, False


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that explains itself, else None."""
    # Looked up by name where torch need not be imported to know that the error is not one of them.
    names = {cls.__name__ for cls in type(error).__mro__}
    if "InputError" in names:
        return BAD_INPUT
    if names & {"FoldMismatchError", "VerificationError"}:
        return REFUSED
    return 1 if names & _EXPECTED else None


def message_of(error: BaseException) -> str:
    """Return one clear message; of a chain of errors the one that is ours, or Hydra's cause."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    ours = next((e for e in chain if isinstance(e, InputError)), None)
    if ours is not None:
        # A data loader's worker sends its whole traceback as the message; the last line is ours.
        text = str(ours)
        return text.splitlines()[-1].rpartition("InputError: ")[2] if "Traceback" in text else text
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        # Hydra lists the options of a single choice, but not those of a list such as callbacks=[x].
        if options := error.options or choices(group):
            return unknown_name(group, name.removesuffix(".yaml"), list(options))
    text = str(error).strip()
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        named = isinstance(error, MissingMandatoryValue) and error.full_key
        key = named or missing[1]
        return f"{key} is required: add {key}=... to the command"
    return text


def base_config(config_name: str, overrides: Sequence[str] = ()) -> Any:
    """Return what a command composes, as plain data that is not resolved."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose(config_name, list(overrides)))


def _unknown_key(config_name: str, message: str) -> str:
    """Return Hydra's message, or a better one if it is about a key that the config lacks."""
    found = re.search(r"Could not override '([^']+)'", message)
    if found is None:
        return message
    key, config = found[1], base_config(config_name)
    told = unknown_key(key, config)
    if "." in key and key.partition(".")[0] in config:
        told += f" An argument that the config leaves out is added with +{key}=..."
    return told


def output_directory() -> Path:
    """Return the absolute directory that Hydra made for this job."""
    return Path(HydraConfig.get().runtime.output_dir)


def remove_if_empty(directory: Path) -> None:
    """Remove the directory that Hydra made for a job that wrote nothing."""
    if directory.is_dir() and directory != Path.cwd() and not any(directory.iterdir()):
        directory.rmdir()


def listed(key: str, value: Any) -> list[str]:
    """Return a value of the command that is a list, or one item of it."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, ListConfig) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{key}={value} must be a list, such as {key}=[one,other]")
    return list(value)


def command_line(script: str, **overrides: Any) -> str:
    """Return the command that runs `script` ('train' or 'deploy') as this process was run."""
    installed = Path(sys.argv[0]).name.startswith("repnet-")
    words = [f"repnet-{script}"] if installed else ["python", f"{script}.py"]
    for key, value in overrides.items():
        words.append(shlex.quote(f"{key}={quoted(value)}"))
    return " ".join(words)


def quoted(value: Any) -> str:
    """Return a value as Hydra's grammar reads it."""
    if isinstance(value, list):
        return f"[{','.join(quoted(v) for v in value)}]"
    text = str(value)
    if re.fullmatch(r"[\w./:%+@-]+", text, re.ASCII):
        return text
    # Backslashes are escaped only in front of a quotation mark, of the text or the closing one.
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + (found[2] and "\\'"), text)
    return f"'{escaped}'"


def _tell(message: str) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
