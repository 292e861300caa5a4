"""The environment and `.env`: W&B login and mode, data folder, runs folder.

Nothing else in the package reads environment variables. `.env.example` documents each of them.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from mnist_wandb.config import RunConfig
from mnist_wandb.errors import ConfigError

WandbMode = Literal["online", "offline", "disabled"]
WANDB_MODES: tuple[WandbMode, ...] = ("online", "offline", "disabled")
DEFAULT_BASE_URL = "https://api.forge.coreweave.com"  # the client's own default
KNOWN_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
"""Where a key for W&B's own service may be filed in netrc (the newer and the older name)."""


LAUNCH_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """Which of the processes that `torchrun` has started for one run this is.

    Attributes:
        rank, size: number of this process, and of all processes.
        local_rank, local_size: the same among those of this machine.
        machine, num_machines: number of this machine, and of all machines.
        has_chosen_threads: whether the user has set OMP_NUM_THREADS. torchrun sets 1 where it is
            missing, which looks like a user's 1.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    machine: int = 0
    num_machines: int = 1
    has_chosen_threads: bool = False


def load_launch() -> Launch | None:
    """Read what torchrun has set; None without it, and where it has started one process only.

    Raises:
        ConfigError: a variable is missing or no number.
    """
    environment = os.environ
    if not all(environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    for name in (*LAUNCH_VARIABLES, "MASTER_PORT"):
        if not re.fullmatch(r"[0-9]{1,6}", environment.get(name, "")):
            found = environment.get(name, "nothing")
            raise ConfigError(
                f"{name}: got {found!r}, expected a number; several processes are started with"
                " torchrun, which sets it (or unset RANK, WORLD_SIZE and LOCAL_RANK)"
            )
    rank, size, local_rank, local_size, machine, num_machines = (
        int(environment[name]) for name in LAUNCH_VARIABLES
    )
    if size == 1:
        return None
    chosen = environment.get("OMP_NUM_THREADS", "1") != "1"
    return Launch(rank, size, local_rank, local_size, machine, num_machines, chosen)


@dataclass(frozen=True)
class Settings:
    """What the surroundings say; made by `load_settings`.

    Attributes:
        data_dir: where data sets lie and are downloaded to.
        runs_dir: where run folders are made.
        wandb_mode: WANDB_MODE, or None when it is not set.
        wandb_base_url: address of the W&B server.
        wandb_entity: WANDB_ENTITY, or None.
        wandb_project: WANDB_PROJECT, or None.
        api_key_source: where an API key was found, or None. The key itself is never kept here.
        sweep_id: WANDB_SWEEP_ID when `wandb agent` started this process.
        sweep_parameters: the file of parameters that the agent wrote, if any.
        wandb_run_id: WANDB_RUN_ID, or None.
        launch: which process of several this is; None for the only one.
    """

    data_dir: Path
    runs_dir: Path
    wandb_mode: WandbMode | None = None
    wandb_base_url: str = DEFAULT_BASE_URL
    wandb_entity: str | None = None
    wandb_project: str | None = None
    api_key_source: str | None = None
    sweep_id: str | None = None
    sweep_parameters: Path | None = None
    wandb_run_id: str | None = None
    launch: Launch | None = None


def load_settings(env_file: Path | None = Path(".env")) -> Settings:
    """Read `.env` in the working folder, then the environment, which wins.

    Values of `.env` are put into `os.environ` where it lacks them, so that the W&B client and
    its service process see the same.

    Raises:
        ConfigError: `.env` cannot be read, or a variable has a value that is not allowed.
    """
    launch = load_launch()  # first: these are no settings for `.env`
    if env_file is not None and env_file.is_file():
        from dotenv import dotenv_values

        try:
            found = dotenv_values(env_file)
            for key, value in found.items():
                if value is not None and key not in os.environ:
                    os.environ[key] = value
        except (OSError, ValueError) as error:
            raise ConfigError(f"{env_file}: cannot be read: {error}") from None
    environment = os.environ
    mode = environment.get("WANDB_MODE") or None
    if mode is not None and mode not in WANDB_MODES:
        raise ConfigError(f"WANDB_MODE: got {mode!r}, allowed: {', '.join(WANDB_MODES)}")
    base_url = environment.get("WANDB_BASE_URL") or DEFAULT_BASE_URL
    if not _is_address(base_url):
        raise ConfigError(
            f"WANDB_BASE_URL: got {base_url!r}, expected an address like https://wandb.example.org"
        )
    parameters = environment.get("WANDB_SWEEP_PARAM_PATH")
    run_id = environment.get("WANDB_RUN_ID") or None
    if run_id is not None and not re.fullmatch(r"[A-Za-z0-9_]{1,64}", run_id):
        raise ConfigError(f"WANDB_RUN_ID: got {run_id!r}, allowed: letters, digits, underscore")
    return Settings(
        data_dir=_folder(environment, "MNIST_WANDB_DATA_DIR", "data"),
        runs_dir=_folder(environment, "MNIST_WANDB_RUNS_DIR", "runs"),
        wandb_mode=mode,
        wandb_base_url=base_url,
        wandb_entity=environment.get("WANDB_ENTITY") or None,
        wandb_project=environment.get("WANDB_PROJECT") or None,
        api_key_source=_find_api_key(environment, base_url, env_file),
        sweep_id=environment.get("WANDB_SWEEP_ID") or None,
        sweep_parameters=Path(parameters) if parameters else None,
        wandb_run_id=run_id,
        launch=launch,
    )


def keep_wandb_files_in(folder: Path) -> None:
    """Let the W&B client stage the files of artifacts and tables there, not in the home folder.

    A run folder is complete that way. WANDB_DATA_DIR wins where the user has set it.
    """
    global _staging_dir  # noqa: PLW0603 - the environment is global, too
    if os.environ.get("WANDB_DATA_DIR") in (None, "", _staging_dir):
        _staging_dir = os.environ["WANDB_DATA_DIR"] = str(folder.absolute())


_staging_dir: str | None = None


def choose_wandb_mode(config: RunConfig, settings: Settings) -> tuple[WandbMode, str]:
    """Decide between online, offline and disabled, without ever asking.

    Returns:
        The mode and the reason in a few words.
    """
    if config.tracking.mode != "auto":
        return config.tracking.mode, "tracking.mode"
    if settings.wandb_mode is not None:
        return settings.wandb_mode, "WANDB_MODE"
    if settings.api_key_source is not None:
        return "online", f"API key in {settings.api_key_source}"
    return "offline", "no API key found"


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        found = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    return bool(found and re.fullmatch(r"https?://[A-Za-z0-9.:\[\]_-]+(/.*)?", text))


def _folder(environment: Mapping[str, str], variable: str, default: str) -> Path:
    folder = Path(environment.get(variable) or default)
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{variable}: got {str(folder)!r}: {error}") from None


def _find_api_key(
    environment: Mapping[str, str], base_url: str, env_file: Path | None
) -> str | None:
    if environment.get("WANDB_API_KEY"):
        return "the environment" if env_file is None else f"the environment or {env_file}"
    hosts = KNOWN_HOSTS if base_url == DEFAULT_BASE_URL else (urlsplit(base_url).hostname or "",)
    candidates = [environment.get("NETRC"), "~/.netrc", "~/_netrc"]
    for candidate in filter(None, candidates):
        try:
            path = Path(candidate).expanduser()
            entries = netrc.netrc(path).hosts
        except (OSError, netrc.NetrcParseError, ValueError, RuntimeError):
            continue
        if any(entries[host][2] for host in hosts if host in entries):
            return str(path)
    return None
