"""What the stand-in W&B server keeps: runs, artifacts, sweeps. Plain Python, for asserts."""

from __future__ import annotations

import base64
import itertools
import json
import math
import random
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from graphql_reader import GraphQLError

HISTORY = "wandb-history.jsonl"
EVENTS = "wandb-events.jsonl"
SUMMARY = "wandb-summary.json"
OUTPUT = "output.log"
DONE = ("finished", "failed", "crashed", "killed", "preempted")
"""States of a run that no process works on."""
Json = dict[str, Any]


def timestamp(seconds: float) -> str:
    """ISO 8601, UTC, as the API gives times."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def digest_hex(digest: str) -> str:
    """A digest in base 64, as hexadecimal digits."""
    return base64.b64decode(digest).hex()


def new_id() -> str:
    """A random id in the form of a run's or sweep's."""
    return secrets.token_hex(4)


@dataclass(eq=False)
class Run:
    """One run; `streams` holds what came through the file stream, by file and line number."""

    entity: str
    project: str
    id: str
    display_name: str = ""
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: list[str] = field(default_factory=list)
    host: str | None = None
    program: str | None = None
    commit: str | None = None
    sweep: str | None = None
    raw_config: Json = field(default_factory=dict)
    """As the client sends it: {key: {"value": …}}, with its own entry `_wandb`."""
    sweep_arguments: Json = field(default_factory=dict)
    """The parameters that a sweep gave it, in the same form."""
    summary: Json = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[Json] = field(default_factory=list)
    state: str = "running"
    exit_code: int | None = None
    preempting: bool = False
    stop_client: bool = False
    stop_agent: bool = False
    created: float = field(default_factory=time.time)
    heartbeat: float = field(default_factory=time.time)

    @property
    def key(self) -> tuple[str, str, str]:
        """Where it is in `server.runs`."""
        return self.entity, self.project, self.id

    @property
    def storage_id(self) -> str:
        """Its id in GraphQL."""
        return "Run:" + ":".join(self.key)

    @property
    def config(self) -> Json:
        """The config as the user gave it."""
        return {k: v["value"] for k, v in self.raw_config.items() if k != "_wandb"}

    @property
    def history(self) -> list[Json]:
        """What `run.log` sent, in order, with `_step`, `_runtime` and `_timestamp`."""
        return [json.loads(line) for line in self.lines(HISTORY)]

    @property
    def events(self) -> list[Json]:
        """System metrics."""
        return [json.loads(line) for line in self.lines(EVENTS)]

    @property
    def output(self) -> list[str]:
        """Console output, without the level and time that the client puts before each line."""
        return [re.sub(r"^(ERROR )?\S+ ", "", line) for line in self.lines(OUTPUT)]

    @property
    def stop(self) -> bool:
        """Whether it was asked to stop."""
        return self.stop_client or self.stop_agent

    def ask_to_stop(self, client: bool = True, agent: bool = True) -> None:
        """The stop button: tell the client in the run's process, and the sweep's agent."""
        self.stop_client, self.stop_agent = client, agent

    def lines(self, name: str) -> list[str]:
        """The lines of a streamed file, by number."""
        stream = self.streams.get(name, {})
        return [stream[number].rstrip("\n") for number in sorted(stream)]

    def line_count(self, name: str) -> int:
        """Where the next line of a streamed file goes."""
        return max(self.streams.get(name, {}), default=-1) + 1

    def values(self, name: str) -> list[Any]:
        """All values of a metric, in order."""
        return [row[name] for row in self.history if name in row]

    def start(self) -> None:
        """A client begins or goes on."""
        self.state, self.exit_code, self.preempting = "running", None, False
        self.stop_client = self.stop_agent = False

    def receive(self, post: Json) -> None:
        """Take a post to the file stream in; content is written at its offset."""
        for name, chunk in post.get("files", {}).items():
            stream = self.streams.setdefault(name, {})
            stream.update(enumerate(chunk["content"], chunk["offset"]))
            if name == SUMMARY:
                self.summary = json.loads(chunk["content"][-1])
        self.preempting |= bool(post.get("preempting"))
        if post.get("complete"):
            self.exit_code = post.get("exitcode", 0)
            ended = "preempted" if self.preempting else "failed"
            self.state = ended if self.exit_code else "finished"
        elif self.state != "running":
            self.state = "running"


@dataclass(eq=False)
class Artifact:
    """One version of an artifact; `version` is None until it is committed."""

    id: str
    entity: str
    project: str
    type: str
    name: str
    digest: str
    description: str | None = None
    metadata: Json = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    manifest: Json = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    logged_by: str | None = None
    used_by: list[str] = field(default_factory=list)
    history_step: int | None = None
    version: int | None = None
    created: float = field(default_factory=time.time)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(len(content) for content in self.files.values())


@dataclass(eq=False)
class Collection:
    """All committed versions of an artifact, oldest first."""

    entity: str
    project: str
    type: str
    name: str
    versions: list[Artifact] = field(default_factory=list)
    created: float = field(default_factory=time.time)

    def find(self, alias: str) -> Artifact | None:
        """The version with an alias, or with a number like `v3`."""
        for artifact in self.versions:
            if alias in (*artifact.aliases, f"v{artifact.version}"):
                return artifact
        return None

    def give_aliases(self, artifact: Artifact, aliases: list[str]) -> None:
        """Give a version aliases; an alias is on one version at a time."""
        for other in self.versions:
            other.aliases = [alias for alias in other.aliases if alias not in aliases]
        artifact.aliases = sorted({*artifact.aliases, *aliases})


@dataclass(eq=False)
class Agent:
    """One `wandb agent`."""

    id: str
    host: str
    runs: list[Run] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    heartbeat: float = field(default_factory=time.time)


@dataclass(eq=False)
class Sweep:
    """One sweep; `state` is PENDING, RUNNING, PAUSED, FINISHED (stopped, too) or CANCELED."""

    entity: str
    project: str
    id: str
    config: Json
    config_text: str
    display_name: str | None = None
    state: str = "PENDING"
    runs: list[Run] = field(default_factory=list)
    agents: list[Agent] = field(default_factory=list)
    requeued: list[Run] = field(default_factory=list)
    handed_out: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(0))
    created: float = field(default_factory=time.time)

    @property
    def storage_id(self) -> str:
        """Its id in GraphQL."""
        return f"Sweep:{self.entity}:{self.project}:{self.id}"

    @property
    def best_loss(self) -> float | None:
        """The best final value of the sweep's metric."""
        metric = self.config.get("metric") or {}
        values = [run.summary.get(metric.get("name", "")) for run in self.runs]
        numbers = [value for value in values if isinstance(value, int | float)]
        best = max if metric.get("goal") == "maximize" else min
        return best(numbers, default=None)

    @property
    def planned(self) -> int | None:
        """How many runs it will have; None where there is no end."""
        counts = [self.config["run_cap"]] if self.config.get("run_cap") else []
        if self.config["method"] == "grid":
            counts.append(math.prod(len(list(grid(p))) for p in self.config["parameters"].values()))
        return min(counts, default=None)

    def next_parameters(self) -> Json | None:
        """The next point, or None at the end of the grid or at the run cap."""
        if self.planned is not None and self.handed_out >= self.planned:
            return None
        self.handed_out += 1
        parameters = {"parameters": self.config["parameters"]}
        if self.config["method"] == "grid":
            return next(itertools.islice(grid(parameters), self.handed_out - 1, None))
        return draw(parameters, self.random)


def grid(parameter: Mapping[str, Any]) -> Iterator[Any]:
    """All values of a parameter, in order; of nested parameters, all combinations.

    Raises:
        GraphQLError: a distribution that has no list of values.
    """
    if "parameters" in parameter:
        names = list(parameter["parameters"])
        choices = [list(grid(parameter["parameters"][name])) for name in names]
        for values in itertools.product(*choices):
            yield dict(zip(names, values, strict=True))
    elif "value" in parameter:
        yield parameter["value"]
    elif "values" in parameter:
        yield from parameter["values"]
    elif parameter.get("distribution") == "int_uniform":
        yield from range(parameter["min"], parameter["max"] + 1)
    elif parameter.get("distribution") == "q_uniform":
        q = parameter.get("q", 1)
        for i in range(math.ceil((parameter["max"] - parameter["min"]) / q)):
            yield parameter["min"] + i * q  # without max, as W&B does
    else:
        raise GraphQLError(f"Invalid sweep config: no grid over {dict(parameter)}", status=400)


def draw(parameter: Mapping[str, Any], source: random.Random) -> Any:
    """A random value of a parameter; of nested parameters, a mapping of them.

    Raises:
        GraphQLError: unknown distribution.
    """
    if "parameters" in parameter:
        return {name: draw(p, source) for name, p in parameter["parameters"].items()}
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return source.choices(parameter["values"], parameter.get("probabilities"))[0]
    low, high = parameter.get("min", 0), parameter.get("max", 1)
    mean, deviation = parameter.get("mu", 0), parameter.get("sigma", 1)
    name = parameter.get("distribution", "uniform")
    match name.removeprefix("q_"):
        case "int_uniform":
            return source.randint(low, high)
        case "uniform":
            value = source.uniform(low, high)
        case "log_uniform":
            value = math.exp(source.uniform(low, high))
        case "log_uniform_values":
            value = math.exp(source.uniform(math.log(low), math.log(high)))
        case "inv_log_uniform":
            value = 1 - math.exp(source.uniform(low, high))
        case "inv_log_uniform_values":
            value = low + high - math.exp(source.uniform(math.log(low), math.log(high)))
        case "normal":
            value = source.gauss(mean, deviation)
        case "log_normal":
            value = source.lognormvariate(mean, deviation)
        case "beta":
            value = source.betavariate(parameter.get("a", 1), parameter.get("b", 1))
        case _:
            raise GraphQLError(f"Invalid sweep config: distribution {name}", status=400)
    q = parameter.get("q", 1)
    return round(value / q) * q if name.startswith("q_") else value


def check_sweep(config: Any) -> None:
    """Refuse what the real server refuses first; it checks much more.

    Raises:
        GraphQLError: with the reason.
    """
    if not isinstance(config, dict) or config.get("method") not in ("grid", "random", "bayes"):
        found = config.get("method") if isinstance(config, dict) else config
        raise GraphQLError(f"Invalid sweep config: method {found!r}", status=400)
    parameters = config.get("parameters")
    if not isinstance(parameters, dict) or not all(
        isinstance(parameter, dict) for parameter in parameters.values()
    ):
        raise GraphQLError("Invalid sweep config: parameters are missing", status=400)
    if config["method"] == "bayes" and not config.get("metric"):
        raise GraphQLError("Invalid sweep config: bayes needs a metric", status=400)
    nested = {"parameters": parameters}
    if config["method"] == "grid":
        next(grid(nested), None)
    else:
        draw(nested, random.Random(0))


@dataclass
class State:
    """Everything; what `--state` keeps from one process to the next."""

    runs: dict[tuple[str, str, str], Run] = field(default_factory=dict)
    artifacts: dict[tuple[str, str, str], Collection] = field(default_factory=dict)
    sweeps: dict[tuple[str, str, str], Sweep] = field(default_factory=dict)
    agents: dict[str, tuple[Agent, Sweep]] = field(default_factory=dict)
    projects: list[tuple[str, str]] = field(default_factory=list)
    versions: dict[str, Artifact] = field(default_factory=dict)
    """All versions by id, those that are not committed as well."""
    client_ids: dict[str, str] = field(default_factory=dict)
    """The ids of versions by those that the client gave them."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Contents of artifact files by MD5 (hexadecimal), and of manifests by version id."""

    def run(self, run_id: str) -> Run:
        """The run with an id, wherever it is."""
        (found,) = [run for run in self.runs.values() if run.id == run_id]
        return found

    def sweep(self, sweep_id: str) -> Sweep:
        """The sweep with an id, wherever it is."""
        (found,) = [sweep for sweep in self.sweeps.values() if sweep.id == sweep_id]
        return found

    def artifact(self, name: str) -> Artifact:
        """The version `name:alias` (or `entity/project/name:alias`)."""
        path, _, alias = name.partition(":")
        (found,) = [
            collection.find(alias or "latest")
            for key, collection in self.artifacts.items()
            if "/".join(key).endswith("/" + path)
        ]
        assert found is not None, f"{name}: no such version"
        return found
