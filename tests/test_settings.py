"""The environment, `.env` and netrc; the only test module that sets real variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnist_wandb.errors import ConfigError
from mnist_wandb.loading import load_config
from mnist_wandb.settings import (
    DEFAULT_BASE_URL,
    KNOWN_HOSTS,
    Launch,
    Settings,
    choose_wandb_mode,
    keep_wandb_files_in,
    load_launch,
    load_settings,
)

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """`load_settings` writes into os.environ, past monkeypatch."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_load_settings_has_defaults_for_everything() -> None:
    assert load_settings() == Settings(data_dir=Path("data"), runs_dir=Path("runs"))
    assert load_settings().wandb_base_url == DEFAULT_BASE_URL


def test_load_settings_reads_the_env_file_in_the_working_folder() -> None:
    Path(".env").write_text(
        "# a comment\n\nWANDB_MODE=offline\nexport WANDB_ENTITY='team one'\n"
        'WANDB_PROJECT="p"  # why\nMNIST_WANDB_RUNS_DIR=/there/runs\n'
    )
    settings = load_settings()
    assert settings.wandb_mode == "offline"
    assert settings.wandb_entity == "team one"
    assert settings.wandb_project == "p"
    assert settings.runs_dir == Path("/there/runs")


def test_load_settings_hands_the_env_file_on_to_the_wandb_client() -> None:
    Path(".env").write_text("WANDB_TESTED_HERE=yes\n")
    load_settings()
    assert os.environ["WANDB_TESTED_HERE"] == "yes"


@pytest.mark.parametrize("real", ["online", ""])
def test_the_real_environment_wins_over_the_env_file(
    real: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", real)
    Path(".env").write_text("WANDB_MODE=offline\n")
    assert load_settings().wandb_mode == (real or None)
    assert os.environ["WANDB_MODE"] == real


def test_load_settings_can_leave_the_env_file_alone() -> None:
    Path(".env").write_text("WANDB_MODE=offline\n")
    assert load_settings(None).wandb_mode is None
    assert "WANDB_MODE" not in os.environ


@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_or_empty_env_file_changes_nothing(content: bytes | None) -> None:
    if content is not None:
        Path(".env").write_bytes(content)
    before = dict(os.environ)
    load_settings()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe=1", ".*utf-8"),
        (b"TESTED=x\0y\n", "embedded null"),
        (b"A\0B=1\n", "embedded null"),
    ],
)
def test_load_settings_rejects_an_env_file_that_is_not_text(content: bytes, reason: str) -> None:
    Path(".env").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^\.env: cannot be read: {reason}"):
        load_settings()


@pytest.mark.parametrize("mode", ["ONLINE", "dryrun", "true", "off line"])
def test_load_settings_rejects_an_unknown_wandb_mode(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert str(caught.value) == f"WANDB_MODE: got {mode!r}, allowed: online, offline, disabled"


@pytest.mark.parametrize(
    ("variable", "field", "default"),
    [
        ("MNIST_WANDB_DATA_DIR", "data_dir", Path("data")),
        ("MNIST_WANDB_RUNS_DIR", "runs_dir", Path("runs")),
    ],
)
def test_folders_come_from_the_environment(
    variable: str, field: str, default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "~/elsewhere")
    assert getattr(load_settings(), field) == Path.home() / "elsewhere"
    monkeypatch.setenv(variable, "")
    assert getattr(load_settings(), field) == default


@pytest.mark.parametrize("variable", ["MNIST_WANDB_DATA_DIR", "MNIST_WANDB_RUNS_DIR"])
def test_a_folder_of_an_unknown_user_is_rejected(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "~nosuchuser/x")
    with pytest.raises(ConfigError, match=rf"^{variable}: got '~nosuchuser/x': Could not determ"):
        load_settings()


@pytest.mark.parametrize(
    "address",
    [
        *("http://[bad", "http://[bad]/x", "http://]", "ftp://x", "wandb.example.org", "https://"),
        *("http://a b", "http://x\n"),
    ],
)
def test_load_settings_rejects_an_address_of_another_form(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", address)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert str(caught.value) == (
        f"WANDB_BASE_URL: got {address!r}, expected an address like https://wandb.example.org"
    )


@pytest.mark.parametrize("run_id", ["my-run", "a/b", "é", "a b", "x\n", "x" * 65])
def test_load_settings_rejects_a_run_id_that_no_folder_name_can_end_with(
    run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", run_id)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert str(caught.value) == (
        f"WANDB_RUN_ID: got {run_id!r}, allowed: letters, digits, underscore"
    )


def test_load_settings_reads_what_an_agent_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "config-defaults.yaml")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    settings = load_settings()
    assert settings.sweep_id == "abc"
    assert settings.sweep_parameters == Path("config-defaults.yaml")
    assert settings.wandb_run_id == "r1"


# ── the key ──────────────────────────────────────────────────────────────────────────────────


def write_netrc(host: str, monkeypatch: pytest.MonkeyPatch, path: Path | None = None) -> Path:
    path = path or Path("my-netrc").absolute()
    path.write_text(f"machine {host}\n  login user\n  password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(path))
    return path


def test_the_key_is_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert load_settings(None).api_key_source == "the environment"


def test_the_key_is_found_in_the_env_file() -> None:
    Path(".env").write_text(f"WANDB_API_KEY={SECRET}\n")
    assert ".env" in str(load_settings().api_key_source)


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert load_settings().api_key_source is None


@pytest.mark.parametrize(
    ("base_url", "host", "found"),
    [
        *((base_url, host, True) for base_url in (None, "") for host in KNOWN_HOSTS),
        ("https://api.wandb.ai", "api.wandb.ai", True),
        ("https://wandb.example.org", "wandb.example.org", True),
        ("https://wandb.example.org:8443/path", "wandb.example.org", True),
        ("http://localhost:8080", "localhost", True),
        ("https://wandb.example.org", "api.wandb.ai", False),
        (None, "wandb.example.org", False),
    ],
)
def test_the_key_is_found_in_netrc_for_the_host_of_the_server_only(
    base_url: str | None, host: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_netrc(host, monkeypatch)
    if base_url is not None:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    assert load_settings().api_key_source == (str(path) if found else None)


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_the_key_is_found_in_the_home_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_netrc("api.wandb.ai", monkeypatch, Path.home() / name)
    monkeypatch.delenv("NETRC")
    assert load_settings().api_key_source == str(path)


@pytest.mark.parametrize(
    "content", [b"machine", b"machine api.wandb.ai login", b"nonsense here", b"\xff\xfe", b""]
)
def test_a_broken_netrc_is_ignored(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad").write_bytes(content)
    monkeypatch.setenv("NETRC", "bad")
    assert load_settings().api_key_source is None


def test_a_broken_netrc_does_not_hide_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_netrc("api.wandb.ai", monkeypatch, Path.home() / ".netrc")
    Path("bad").write_text("nonsense here")
    monkeypatch.setenv("NETRC", "bad")
    assert load_settings().api_key_source == str(path)


def test_a_netrc_of_an_unknown_user_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_netrc("api.wandb.ai", monkeypatch, Path.home() / ".netrc")
    monkeypatch.setenv("NETRC", "~nosuchuser/netrc")
    assert load_settings().api_key_source == str(path)


@pytest.mark.parametrize("place", ["environment", "env file", "netrc"])
def test_the_key_itself_is_never_kept(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
    elif place == "env file":
        Path(".env").write_text(f"WANDB_API_KEY={SECRET}\n")
    else:
        write_netrc("api.wandb.ai", monkeypatch)
    settings = load_settings()
    assert settings.api_key_source is not None
    assert SECRET not in repr(settings)
    assert SECRET not in str(vars(settings))


# ── the mode ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config_mode", "environment_mode", "key", "expected"),
    [
        ("disabled", "online", "netrc", ("disabled", "tracking.mode")),
        ("online", "offline", None, ("online", "tracking.mode")),
        ("auto", "disabled", "netrc", ("disabled", "WANDB_MODE")),
        ("auto", "online", None, ("online", "WANDB_MODE")),
        ("auto", None, "netrc", ("online", "API key in netrc")),
        ("auto", None, None, ("offline", "no API key found")),
    ],
)
def test_choose_wandb_mode_takes_config_then_variable_then_key_then_offline(
    config_mode: str,
    environment_mode: str | None,
    key: str | None,
    expected: tuple[str, str],
) -> None:
    config = load_config("quickstart", [f"tracking.mode={config_mode}"])
    settings = Settings(
        Path("data"),
        Path("runs"),
        wandb_mode=environment_mode,  # type: ignore[arg-type]
        api_key_source=key,
    )
    assert choose_wandb_mode(config, settings) == expected


# ── staged files ─────────────────────────────────────────────────────────────────────────────


def test_wandb_stages_its_files_in_the_folder_of_the_latest_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_DATA_DIR")
    for name in ("first", "second"):
        keep_wandb_files_in(Path(name))
        assert os.environ["WANDB_DATA_DIR"] == str(Path(name).absolute())


def test_wandb_stages_its_files_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", "/mine")
    keep_wandb_files_in(Path("run"))
    assert os.environ["WANDB_DATA_DIR"] == "/mine"


# ── torchrun ─────────────────────────────────────────────────────────────────────────────────

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip


def test_without_torchrun_there_is_one_process() -> None:
    assert load_launch() is None
    os.environ["RANK"] = "3"  # set by something else, for itself
    assert load_launch() is None


@pytest.mark.parametrize(("threads", "chosen"), [(None, False), ("1", False), ("4", True)])
def test_load_launch_reads_what_torchrun_sets(threads: str | None, chosen: bool) -> None:
    del os.environ["OMP_NUM_THREADS"]
    os.environ.update(TORCHRUN)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    expected = Launch(
        rank=3, size=4, local_rank=1, local_size=2, machine=1, num_machines=2,
        has_chosen_threads=chosen,
    )  # fmt: skip
    assert load_launch() == load_settings().launch == expected


def test_one_process_under_torchrun_is_an_ordinary_run() -> None:
    os.environ.update(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"})
    assert load_launch() is None


@pytest.mark.parametrize(("name", "value"), [("LOCAL_WORLD_SIZE", None), ("RANK", "first")])
def test_an_incomplete_launch_is_refused(name: str, value: str | None) -> None:
    os.environ.update(TORCHRUN)
    del os.environ[name]
    if value is not None:
        os.environ[name] = value
    with pytest.raises(ConfigError, match=f"{name}: got '{value or 'nothing'}', expected a number"):
        load_launch()
