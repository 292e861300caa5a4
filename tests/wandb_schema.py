"""The stand-in W&B server's GraphQL: what its objects look like, and what each operation does."""

from __future__ import annotations

import fnmatch
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import yaml
from graphql_reader import GraphQLError
from wandb_state import (
    DONE,
    EVENTS,
    HISTORY,
    OUTPUT,
    Agent,
    Artifact,
    Collection,
    Json,
    Run,
    State,
    Sweep,
    check_sweep,
    digest_hex,
    new_id,
    timestamp,
)

ENTITY = "tester"
ENTITIES = (ENTITY, "team")
CRASHED_AFTER_SECONDS = 300.0
"""A run that is silent for so long has crashed (or was preempted)."""
PROJECT_ID = "1"


def connection(nodes: list[Json], first: int | None = None, after: str | None = None) -> Json:
    """One page of a list, as GraphQL gives it; the cursor is the position of the last node."""
    start = int(after) + 1 if after else 0
    end = len(nodes) if first is None else min(start + first, len(nodes))
    edges = [
        {"node": nodes[i], "cursor": str(i), "version": f"v{nodes[i].get('versionIndex')}"}
        for i in range(start, end)
    ]
    page = {"__typename": "PageInfo", "endCursor": str(end - 1), "hasNextPage": end < len(nodes)}
    return {"edges": edges, "pageInfo": page, "totalCount": len(nodes)}


def sampled(
    rows: list[Json],
    keys: Sequence[str] = (),
    samples: int = 500,
    min_step: int = 0,
    max_step: float | None = None,
) -> list[Json]:
    """Rows that have all of the keys, from one step to before another, evenly thinned."""
    stop = math.inf if max_step is None else max_step
    found = [row for row in rows if min_step <= row["_step"] < stop]
    found = [row for row in found if all(key in row for key in keys)]
    found = found[:: max(1, len(found) // max(1, samples))]
    return [{key: row[key] for key in keys} for row in found] if keys else found


def user_fields() -> Json:
    """The only user."""
    return {
        "__typename": "User",
        "id": "User:1",
        "name": "Test User",
        "username": ENTITY,
        "email": "tester@example.com",
        "entity": ENTITY,
        "flags": "{}",
        "admin": False,
        "deletedAt": None,
        "apiKeys": connection([]),
        "teams": connection([{"name": name} for name in ENTITIES]),
    }


# ── filters and orders of the public API ─────────────────────────────────────────────────────


def run_value(run: Run, name: str) -> Any:
    """What a filter or an order calls `state`, `config.lr.value`, `summary_metrics.loss`, …"""
    section, _, rest = name.partition(".")
    if section in ("config", "summary_metrics"):
        value: Any = run.raw_config if section == "config" else run.summary
        if section == "summary_metrics" and rest in value:
            return value[rest]
        for part in rest.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value
    names = {"name": "id", "createdAt": "created", "created_at": "created", "jobType": "job_type"}
    return getattr(run, names.get(name, name))


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda found, wanted: found == wanted,
    "$ne": lambda found, wanted: found != wanted,
    "$in": lambda found, wanted: found in wanted,
    "$nin": lambda found, wanted: found not in wanted,
    "$gt": lambda found, wanted: found is not None and found > wanted,
    "$gte": lambda found, wanted: found is not None and found >= wanted,
    "$lt": lambda found, wanted: found is not None and found < wanted,
    "$lte": lambda found, wanted: found is not None and found <= wanted,
}


def matches(run: Run, filters: Json) -> bool:
    """Whether a run passes a filter in MongoDB's form (the common operators)."""
    for name, wanted in filters.items():
        if name in ("$and", "$or"):
            passed = [matches(run, part) for part in wanted]
            if not (all(passed) if name == "$and" else any(passed)):
                return False
            continue
        tests = wanted if isinstance(wanted, dict) else {"$eq": wanted}
        found = run_value(run, name)
        if isinstance(found, list):  # tags: any of them
            if not any(
                COMPARISONS[op](item, value) for item in found for op, value in tests.items()
            ):
                return False
        elif not all(COMPARISONS[op](found, value) for op, value in tests.items()):
            return False
    return True


def ordered(runs: list[Run], order: str | None) -> list[Run]:
    """Runs by an order like `-summary_metrics.loss`; those without a value come last."""
    name = (order or "+created_at").lstrip("+-")
    present = [run for run in runs if run_value(run, name) is not None]
    present.sort(key=lambda run: run_value(run, name), reverse=(order or "").startswith("-"))
    return present + [run for run in runs if run not in present]


class Schema:
    """All queries and mutations over a state.

    Args:
        state: what they read and change.

    Attributes:
        url: the server's address, for the addresses of files.
        replay_appends: what becomes of a run that is sent once more without `resume`. False, as
            W&B documents it: the new rows are written over the old ones. True: they come after
            them, which is what the client does if the server tells it how many there are.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.url = ""
        self.replay_appends = False
        self.query = {
            "__typename": "Query",
            "viewer": user_fields,
            "serverInfo": {"features": []},
            "entity": self.entity,
            "project": self.project,
            "model": self.project,
            "models": self.projects,
            "artifact": lambda id: self.artifact(self.state.versions.get(id)),  # noqa: A006
            "clientIDMapping": self.client_id_mapping,
        }
        self.mutation = {
            "__typename": "Mutation",
            "upsertBucket": self.upsert_bucket,
            "upsertModel": self.upsert_model,
            "deleteRun": self.delete_run,
            "stopRun": self.stop_run,
            "createRunFiles": self.create_run_files,
            "markRunFilesUploaded": {"success": True},
            "notifyScriptableRunAlert": self.notify_alert,
            "createArtifact": self.create_artifact,
            "createArtifactManifest": self.create_manifest,
            "createArtifactFiles": self.create_artifact_files,
            "commitArtifact": self.commit_artifact,
            "updateArtifact": self.update_artifact,
            "addAliases": self.add_aliases,
            "deleteAliases": self.delete_aliases,
            "useArtifact": self.use_artifact,
            "upsertSweep": self.upsert_sweep,
            "createAgent": self.create_agent,
            "agentHeartbeat": self.agent_heartbeat,
        }

    # ── people and projects ──────────────────────────────────────────────────────────────────

    def entity(self, name: str) -> Json | None:
        """A user or team; there are no organizations."""
        fields = {"id": f"Entity:{name}", "name": name, "organization": None, "user": None}
        return {**fields, "xxhashDigestsEnabled": False} if name in ENTITIES else None

    def projects(self, entity_name: str | None = None) -> Json:
        """All projects of an entity."""
        entity = entity_name or ENTITY
        names = dict.fromkeys(key[1] for key in self.state.projects if key[0] == entity)
        return connection([self.project_info(entity, name) for name in names])

    def project_info(self, entity: str, project: str) -> Json:
        """A project, as far as other objects show it."""
        return {
            "__typename": "Project",
            "id": f"Project:{entity}:{project}",
            "internalId": PROJECT_ID,
            "name": project,
            "entityName": entity,
            "description": None,
            "access": "PRIVATE",
            "views": "{}",
            "createdAt": timestamp(0),
            "isBenchmark": False,
            "readOnly": False,
            "user": user_fields,
            "entity": {"id": f"Entity:{entity}", "name": entity},
        }

    def project(self, name: str | None = None, entity_name: str | None = None) -> Json | None:
        """A project with what is in it, or None where nothing was sent to it yet."""
        place = (entity_name or ENTITY, name or "uncategorized")
        if place not in self.state.projects:
            return None

        def bucket(name: str, missing_ok: bool = False) -> Json | None:
            return self.run(self.state.runs.get((*place, name)))

        def chosen(filters: str | None = None) -> list[Run]:
            inside = [run for key, run in self.state.runs.items() if key[:2] == place]
            return [run for run in inside if matches(run, json.loads(filters or "{}"))]

        def runs(
            filters: str | None = None,
            order: str | None = None,
            first: int | None = None,
            after: str | None = None,
        ) -> Json:
            found = ordered(chosen(filters), order)
            return connection([self.run(run) for run in found], first, after)

        def sweep(sweep_name: str) -> Json | None:
            return self.sweep(self.state.sweeps.get((*place, sweep_name)))

        collections = [c for key, c in self.state.artifacts.items() if key[:2] == place]
        sweeps = [s for key, s in self.state.sweeps.items() if key[:2] == place]
        return {
            **self.project_info(*place),
            "bucket": bucket,
            "run": bucket,
            "runs": runs,
            "runCount": lambda filters=None: len(chosen(filters)),
            "sweep": sweep,
            "sweeps": lambda: connection([self.sweep(s) for s in sweeps]),
            "totalSweeps": len(sweeps),
            "artifact": lambda name: self.artifact(self.named_version(place, name)),
            "artifactCollectionMembership": lambda name: self.membership(
                self.named_version(place, name)
            ),
            "artifactCollection": lambda name: self.collection(
                self.state.artifacts.get((*place, name))
            ),
            "artifactType": lambda name: self.artifact_type(name, collections),
            "artifactTypes": lambda: connection(
                [self.artifact_type(kind, collections) for kind in {c.type: 0 for c in collections}]
            ),
            "artifactCollections": lambda: connection([self.collection(c) for c in collections]),
        }

    def upsert_model(self, name: str, entity_name: str | None = None) -> Json:
        """Create a project."""
        place = (self.check_entity(entity_name), name)
        inserted = place not in self.state.projects
        self.state.projects.append(place)
        found = self.project_info(*place)
        return {"project": found, "model": found, "inserted": inserted}

    def check_entity(self, name: str | None) -> str:
        """An entity's name, or the user's own.

        Raises:
            GraphQLError: there is none of that name (or it is not the user's).
        """
        if name and name not in ENTITIES:
            raise GraphQLError(f"entity {name} not found during upsertBucket", status=404)
        return name or ENTITY

    # ── runs ─────────────────────────────────────────────────────────────────────────────────

    def run(self, run: Run | None) -> Json | None:
        """All fields of a run that anyone asks for."""
        if run is None:
            return None
        rows = run.history
        started = run.raw_config.get("_wandb", {}).get("value", {}).get("t")

        def history(
            min_step: int = 0, max_step: float | None = None, samples: int = 500
        ) -> list[str]:
            return [json.dumps(row) for row in sampled(rows, [], samples, min_step, max_step)]

        def sampled_history(specs: list[str] | str) -> list[list[Json]]:
            found = []
            for text in [specs] if isinstance(specs, str) else specs:  # GraphQL takes one as a list
                spec = json.loads(text)
                stop = spec["maxStep"] + 1 if "maxStep" in spec else None  # the last one is meant
                limits = (spec.get("samples", 500), spec.get("minStep", 0), stop)
                found.append(sampled(rows, spec.get("keys", []), *limits))
            return found

        return {
            "__typename": "Run",
            "id": run.storage_id,
            "name": run.id,
            "projectId": PROJECT_ID,
            "project": lambda: self.project_info(run.entity, run.project),
            "user": user_fields,
            "displayName": run.display_name,
            "description": run.display_name,
            "notes": run.notes,
            "group": run.group,
            "jobType": run.job_type,
            "tags": run.tags,
            "commit": run.commit,
            "sweepName": run.sweep,
            "state": run.state,
            "exitcode": run.exit_code,
            "failed": run.state == "failed",
            "running": run.state == "running",
            "stopped": run.stop,
            "shouldStop": run.stop,
            "readOnly": False,
            "createdAt": timestamp(run.created),
            "heartbeatAt": timestamp(run.heartbeat),
            "config": json.dumps(run.raw_config),
            "wandbConfig": json.dumps({"t": started} if started else {}),
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": json.dumps(run.events[-1] if run.events else {}),
            "historyLineCount": run.line_count(HISTORY),
            "eventsLineCount": run.line_count(EVENTS),
            "logLineCount": run.line_count(OUTPUT),
            "historyTail": json.dumps(run.lines(HISTORY)[-1:]),
            "eventsTail": json.dumps(run.lines(EVENTS)[-1:]),
            "historyKeys": {"lastStep": rows[-1]["_step"] if rows else -1},
            "history": history,
            "events": lambda samples=500: run.lines(EVENTS)[-samples:],
            "sampledHistory": sampled_history,
            # No parquet files: the client then reads the whole history as live data.
            "parquetHistory": {"parquetUrls": [], "liveData": []},
            "fileCount": len(run.files),
            "files": lambda names=(), pattern=None, first=None, after=None: connection(
                self.run_files(run, names, pattern), first, after
            ),
            "outputArtifacts": lambda first=None, after=None: connection(
                [self.artifact(a) for a in self.committed() if a.logged_by == run.id], first, after
            ),
            "inputArtifacts": lambda first=None, after=None: connection(
                [self.artifact(a) for a in self.committed() if run.id in a.used_by], first, after
            ),
        }

    def run_files(self, run: Run, names: list[str], pattern: str | None) -> list[Json]:
        """A run's uploaded files; `pattern` as in SQL's LIKE."""
        glob = (pattern or "%").replace("%", "*").replace("_", "?")
        return [
            {
                "id": f"File:{run.id}:{name}",
                "name": name,
                "url": self.address("run", *run.key, name),
                "directUrl": self.address("run", *run.key, name),
                "sizeBytes": len(content),
                "mimetype": "application/octet-stream",
                "updatedAt": timestamp(run.heartbeat),
                "md5": None,
            }
            for name, content in run.files.items()
            if (name in names if names else fnmatch.fnmatchcase(name, glob))
        ]

    def address(self, *parts: str) -> str:
        """Where a file is put and fetched; like the real one's, it needs no key."""
        return f"{self.url}/storage/" + "/".join(quote(part) for part in parts)

    def upsert_bucket(
        self,
        id: str | None = None,  # noqa: A002
        name: str | None = None,
        model_name: str | None = None,
        entity_name: str | None = None,
        config: str | None = None,
        summary_metrics: str | None = None,
        sweep: str | None = None,
        state: str | None = None,
        **changes: Any,
    ) -> Json:
        """Create or change a run. With its name: a client works on it; without: the public API."""
        inserted = False
        if id is not None and name is None:
            run = self.find_run(id)
        else:
            place = (self.check_entity(entity_name), model_name or "uncategorized")
            if place not in self.state.projects:
                self.state.projects.append(place)
            key = (*place, name or new_id())
            inserted = key not in self.state.runs
            run = self.state.runs.setdefault(key, Run(*key))
            if run.state in (*DONE, "pending"):
                run.start()
            run.state = state or run.state
        for attribute in ("display_name", "notes", "job_type", "tags", "host", "commit"):
            if changes.get(attribute) is not None:
                setattr(run, attribute, changes[attribute])
        run.group = changes.get("group_name") or run.group
        run.program = changes.get("job_program") or run.program
        run.display_name = run.display_name or f"run-{run.id}"
        if config is not None:
            run.raw_config = json.loads(config)
        if summary_metrics is not None:
            run.summary = json.loads(summary_metrics)
        if sweep and not run.sweep:
            run.sweep = sweep
            known = self.state.sweeps.get((run.entity, run.project, sweep))
            if known and run not in known.runs:
                known.runs.append(run)
        run.heartbeat = time.time()
        bucket = self.run(run)
        if id is None and not self.replay_appends:
            bucket["historyLineCount"] = 0  # the client writes its history from there
        return {"bucket": bucket, "inserted": inserted}

    def find_run(self, storage_id: str) -> Run:
        """The run with a GraphQL id."""
        return next(run for run in self.state.runs.values() if run.storage_id == storage_id)

    def delete_run(self, id: str) -> Json:  # noqa: A002
        """Delete a run."""
        del self.state.runs[self.find_run(id).key]
        return {"clientMutationId": None}

    def stop_run(self, id: str) -> Json:  # noqa: A002
        """The stop button."""
        self.find_run(id).ask_to_stop()
        return {"success": True}

    def create_run_files(
        self, entity_name: str, project_name: str, run_name: str, files: list[str]
    ) -> Json:
        """Where to put files of a run."""
        key = (entity_name, project_name, run_name)
        urls = [{"name": name, "uploadUrl": self.address("run", *key, name)} for name in files]
        return {"runID": self.state.runs[key].storage_id, "uploadHeaders": [], "files": urls}

    def notify_alert(
        self,
        entity_name: str,
        project_name: str,
        run_name: str,
        title: str,
        text: str,
        severity: str = "INFO",
    ) -> Json:
        """An alert; nobody is mailed."""
        alert = {"title": title, "text": text, "severity": severity}
        self.state.runs[entity_name, project_name, run_name].alerts.append(alert)
        return {"success": True}

    def note_silent_runs(self) -> None:
        """Runs that are silent for long have crashed, or were preempted."""
        for run in self.state.runs.values():
            if run.state == "running" and time.time() - run.heartbeat > CRASHED_AFTER_SECONDS:
                run.state = "preempted" if run.preempting else "crashed"
                self.requeue(run)

    # ── artifacts ────────────────────────────────────────────────────────────────────────────

    def committed(self) -> list[Artifact]:
        """All versions that can be used, oldest first."""
        return [a for a in self.state.versions.values() if a.version is not None]

    def named_version(self, place: tuple[str, str], name: str) -> Artifact | None:
        """The version `name:alias` in a project."""
        name, _, alias = name.partition(":")
        collection = self.state.artifacts.get((*place, name))
        return collection.find(alias or "latest") if collection else None

    def artifact_type(self, name: str, collections: list[Collection]) -> Json | None:
        """A type of artifacts, with those of a project."""
        found = {c.name: c for c in collections if c.type == name}
        if not found:
            return None
        return {
            "__typename": "ArtifactType",
            "id": f"ArtifactType:{name}",
            "name": name,
            "description": None,
            "createdAt": timestamp(0),
            "artifactCollection": lambda name: self.collection(found.get(name)),
            "artifactCollections": lambda: connection([self.collection(c) for c in found.values()]),
        }

    def collection_info(self, entity: str, project: str, name: str) -> Json:
        """A collection, as far as its versions show it."""
        return {
            "__typename": "ArtifactSequence",
            "id": f"ArtifactSequence:{entity}:{project}:{name}",
            "name": name,
            "project": lambda: self.project_info(entity, project),
        }

    def collection(self, collection: Collection | None) -> Json | None:
        """All versions of an artifact."""
        if collection is None:
            return None
        newest = [self.artifact(version) for version in reversed(collection.versions)]
        aliases = [alias for version in newest for alias in version["aliases"]]
        info = self.collection_info(collection.entity, collection.project, collection.name)
        return {
            **info,
            "description": None,
            "createdAt": timestamp(collection.created),
            "updatedAt": None,
            "defaultArtifactType": {"name": collection.type},
            "digestAlgorithm": "MANIFEST_MD5",
            "tags": connection([]),
            "aliases": connection(aliases),
            "latestArtifact": newest[0] if newest else None,
            "artifacts": lambda first=None, after=None: connection(newest, first, after),
            "artifactMembership": lambda alias_name: self.membership(collection.find(alias_name)),
        }

    def artifact(self, artifact: Artifact | None) -> Json | None:
        """All fields of a version."""
        if artifact is None:
            return None
        key = (artifact.entity, artifact.project, artifact.name)
        info = self.collection_info(*key)
        runs = {run.id: run for run in self.state.runs.values()}
        memberships = connection([self.membership_info(artifact, info)])
        return {
            "__typename": "Artifact",
            "id": artifact.id,
            "state": "PENDING" if artifact.version is None else "COMMITTED",
            "versionIndex": artifact.version,
            "artifactType": {"name": artifact.type},
            "artifactSequence": {
                **info,
                "latestArtifact": lambda: self.artifact(self.named_version(key[:2], key[2])),
            },
            "artifactMemberships": memberships,
            "description": artifact.description,
            "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": -2,  # inherited, which is no limit
            "ttlIsInherited": True,
            "tags": [{"__typename": "Tag", "id": f"Tag:{t}", "name": t} for t in artifact.tags],
            "historyStep": artifact.history_step,
            "size": artifact.size,
            "digest": artifact.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": artifact.id,
            "fileCount": len(artifact.files),
            "createdAt": timestamp(artifact.created),
            "updatedAt": None,
            "aliases": self.aliases(artifact, info),
            "currentManifest": {"file": {"directUrl": self.address("manifest", artifact.id)}},
            "createdBy": lambda: self.run(runs.get(artifact.logged_by)),
            "usedBy": lambda: connection(
                [self.run(runs[i]) for i in artifact.used_by if i in runs]
            ),
        }

    def aliases(self, artifact: Artifact, info: Json) -> list[Json]:
        """A version's aliases."""
        return [
            {
                "__typename": "ArtifactAlias",
                "id": f"ArtifactAlias:{artifact.id}:{alias}",
                "alias": alias,
                "artifactCollection": info,
            }
            for alias in artifact.aliases
        ]

    def membership_info(self, artifact: Artifact, info: Json) -> Json:
        """A version as a member of its collection, without the version's own fields."""
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": f"ArtifactCollectionMembership:{artifact.id}",
            "versionIndex": artifact.version,
            "createdAt": timestamp(artifact.created),
            "aliases": self.aliases(artifact, info),
            "artifactCollection": info,
        }

    def membership(self, artifact: Artifact | None) -> Json | None:
        """A version as a member of its collection."""
        if artifact is None:
            return None
        info = self.collection_info(artifact.entity, artifact.project, artifact.name)
        return {
            **self.membership_info(artifact, info),
            "artifact": self.artifact(artifact),
            "files": lambda names=None, first=None, after=None: connection(
                self.artifact_files(artifact, names), first, after
            ),
        }

    def artifact_files(self, artifact: Artifact, names: list[str] | None) -> list[Json]:
        """A version's files, with where to fetch them."""
        entries = artifact.manifest.get("contents", {})
        return [
            {
                "__typename": "File",
                "id": f"File:{artifact.id}:{name}",
                "name": name,
                "displayName": name,
                "url": self.blob_address(artifact.entity, entries[name]["digest"]),
                "directUrl": self.blob_address(artifact.entity, entries[name]["digest"]),
                "sizeBytes": len(content),
                "storagePath": None,
                "mimetype": None,
                "updatedAt": None,
                "digest": entries[name]["digest"],
                "md5": entries[name]["digest"],
            }
            for name, content in artifact.files.items()
            if not names or name in names
        ]

    def blob_address(self, entity: str, digest: str) -> str:
        """Where contents with an MD5 digest (base 64) are kept."""
        return self.address("blob", entity, digest_hex(digest))

    def create_artifact(
        self,
        entity_name: str,
        project_name: str,
        artifact_type_name: str,
        digest: str,
        artifact_collection_name: str | None = None,
        artifact_collection_names: list[str] | None = None,
        run_name: str | None = None,
        description: str | None = None,
        aliases: list[Json] | None = None,
        tags: list[Json] | None = None,
        metadata: str | None = None,
        history_step: int | None = None,
        client_id: str | None = None,
    ) -> Json:
        """A new version, to be committed; or the version that has the same contents."""
        name = artifact_collection_name or (artifact_collection_names or [""])[0]
        key = (entity_name, project_name, name)
        collection = self.state.artifacts.setdefault(
            key, Collection(*key[:2], artifact_type_name, name)
        )
        if collection.type != artifact_type_name:
            raise GraphQLError(f"artifact {name} has type {collection.type}", status=400)
        wanted = [alias["alias"] for alias in aliases or []]
        for version in collection.versions:
            if version.digest == digest:
                collection.give_aliases(version, wanted)
                self.state.client_ids[str(client_id)] = version.id
                return {"artifact": self.artifact(version)}
        artifact = Artifact(
            id=f"Artifact:{len(self.state.versions)}",
            entity=entity_name,
            project=project_name,
            type=artifact_type_name,
            name=name,
            digest=digest,
            description=description,
            metadata=json.loads(metadata or "{}"),
            aliases=wanted,
            tags=[tag["tagName"] for tag in tags or []],
            logged_by=run_name,
            history_step=history_step,
        )
        self.state.versions[artifact.id] = artifact
        self.state.client_ids[str(client_id)] = artifact.id
        return {"artifact": self.artifact(artifact)}

    def create_manifest(self, artifact_id: str) -> Json:
        """Where to put a version's list of files."""
        url = self.address("manifest", artifact_id)
        file = {"id": f"File:{artifact_id}", "uploadUrl": url, "uploadHeaders": []}
        return {"artifactManifest": {"id": f"ArtifactManifest:{artifact_id}", "file": file}}

    def create_artifact_files(self, artifact_files: list[Json]) -> Json:
        """Where to put a version's files; there is no address for contents that are here."""
        nodes = []
        for file in artifact_files:
            artifact = self.state.versions[file["artifactID"]]
            stored = digest_hex(file["md5"]) in self.state.blobs
            url = None if stored else self.blob_address(artifact.entity, file["md5"])
            nodes.append(
                {
                    "name": file["name"],
                    "displayName": file["name"],
                    "storagePath": f"blob/{artifact.entity}/{digest_hex(file['md5'])}",
                    "uploadUrl": url,
                    "uploadHeaders": [f"Content-MD5:{file['md5']}"],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": artifact.id},
                }
            )
        return {"files": connection(nodes)}

    def commit_artifact(self, artifact_id: str) -> Json:
        """The version is complete: it gets its number, its aliases, and is the latest."""
        artifact = self.state.versions[artifact_id]
        manifest = self.state.blobs.get(artifact_id)
        if manifest is None:
            raise GraphQLError(f"artifact {artifact_id} has no manifest", status=400)
        artifact.manifest = json.loads(manifest)
        for name, entry in artifact.manifest["contents"].items():
            if "ref" in entry:
                continue
            if digest_hex(entry["digest"]) not in self.state.blobs:
                raise GraphQLError(f"artifact file {name} was not uploaded", status=400)
            artifact.files[name] = self.state.blobs[digest_hex(entry["digest"])]
        collection = self.state.artifacts[artifact.entity, artifact.project, artifact.name]
        if artifact.version is None:
            artifact.version = len(collection.versions)
            aliases, artifact.aliases = artifact.aliases, []
            collection.versions.append(artifact)
            collection.give_aliases(artifact, [*aliases, "latest"])
        return {"artifact": self.artifact(artifact)}

    def update_artifact(
        self, artifact_id: str, metadata: str | None = None, description: str | None = None
    ) -> Json:
        """Change a version's metadata or description."""
        artifact = self.state.versions[artifact_id]
        if metadata is not None:
            artifact.metadata = json.loads(metadata)
        if description is not None:
            artifact.description = description
        return {"artifact": self.artifact(artifact)}

    def add_aliases(self, artifact_id: str, aliases: list[Json]) -> Json:
        """Give a version more aliases."""
        artifact = self.state.versions[artifact_id]
        collection = self.state.artifacts[artifact.entity, artifact.project, artifact.name]
        collection.give_aliases(artifact, [alias["alias"] for alias in aliases])
        return {"success": True}

    def delete_aliases(self, artifact_id: str, aliases: list[Json]) -> Json:
        """Take aliases from a version."""
        artifact = self.state.versions[artifact_id]
        gone = [alias["alias"] for alias in aliases]
        artifact.aliases = [alias for alias in artifact.aliases if alias not in gone]
        return {"success": True}

    def use_artifact(self, artifact_id: str, run_name: str) -> Json:
        """A run uses a version as its input."""
        artifact = self.state.versions[artifact_id]
        if run_name not in artifact.used_by:
            artifact.used_by.append(run_name)
        return {"artifact": self.artifact(artifact)}

    def client_id_mapping(self, client_id: str) -> Json | None:
        """The id of a version that the client knows by a number of its own."""
        found = self.state.client_ids.get(client_id)
        return {"serverID": found} if found else None

    # ── sweeps ───────────────────────────────────────────────────────────────────────────────

    def sweep(self, sweep: Sweep | None) -> Json | None:
        """All fields of a sweep."""
        if sweep is None:
            return None
        agents = {agent.id: self.agent(agent) for agent in sweep.agents}
        return {
            "__typename": "Sweep",
            "id": sweep.storage_id,
            "name": sweep.id,
            "project": lambda: self.project_info(sweep.entity, sweep.project),
            "displayName": sweep.display_name,
            "description": sweep.config.get("description"),
            "method": sweep.config["method"],
            "state": sweep.state,
            "config": sweep.config_text,
            "controller": None,
            "scheduler": None,
            "controllerRunName": None,
            "earlyStopJobRunning": False,
            "bestLoss": sweep.best_loss,
            "createdAt": timestamp(sweep.created),
            "updatedAt": timestamp(sweep.created),
            "heartbeatAt": timestamp(sweep.created),
            "runCount": len(sweep.runs),
            "runCountExpected": sweep.planned,
            "runs": lambda first=None, after=None: connection(
                [self.run(run) for run in sweep.runs], first, after
            ),
            "agents": connection(list(agents.values())),
            "agent": lambda agent_name: agents.get(agent_name),  # noqa: PLW0108
        }

    def agent(self, agent: Agent) -> Json:
        """All fields of an agent."""
        return {
            "id": agent.id,
            "name": agent.id,
            "host": agent.host,
            "state": "RUNNING",
            "totalRuns": len(agent.runs),
            "createdAt": timestamp(agent.created),
            "heartbeatAt": timestamp(agent.heartbeat),
            "runs": lambda first=None, after=None: connection(
                [self.run(run) for run in agent.runs], first, after
            ),
        }

    def upsert_sweep(
        self,
        id: str | None = None,  # noqa: A002
        config: str | None = None,
        entity_name: str | None = None,
        project_name: str | None = None,
        state: str | None = None,
        display_name: str | None = None,
    ) -> Json:
        """Create a sweep, or change one."""
        place = (self.check_entity(entity_name), project_name or "uncategorized")
        sweep = None
        if id is not None:
            sweep = next(s for s in self.state.sweeps.values() if id in (s.id, s.storage_id))
        if config is not None:
            wanted = yaml.safe_load(config)
            check_sweep(wanted)
            if sweep is None:
                sweep = Sweep(*place, new_id(), wanted, config)
                self.state.sweeps[sweep.entity, sweep.project, sweep.id] = sweep
                if place not in self.state.projects:
                    self.state.projects.append(place)
            sweep.config, sweep.config_text = wanted, config
        assert sweep is not None
        sweep.state = state or sweep.state
        sweep.display_name = display_name or sweep.display_name
        return {"sweep": self.sweep(sweep), "configValidationWarnings": []}

    def create_agent(
        self, host: str, sweep: str, project_name: str | None = None, entity_name: str | None = None
    ) -> Json:
        """An agent has started."""
        found = self.state.sweeps.get(
            (entity_name or ENTITY, project_name or "uncategorized", sweep)
        )
        if found is None:
            raise GraphQLError(f"sweep {sweep} not found", status=404)
        agent = Agent(f"Agent:{new_id()}", host)
        found.agents.append(agent)
        self.state.agents[agent.id] = (agent, found)
        return {"agent": self.agent(agent)}

    def agent_heartbeat(self, id: str, run_state: str = "{}") -> Json:  # noqa: A002
        """Tell an agent what to do: go on, stop a run, start one, or exit."""
        if id not in self.state.agents:
            raise GraphQLError(f"agent {id} not found", status=404)
        agent, sweep = self.state.agents[id]
        agent.heartbeat = time.time()
        active = [run for run in agent.runs if json.loads(run_state).get(run.id)]
        commands = [
            {"type": "stop", "run_id": run.id}
            for run in active
            if run.stop_agent or sweep.state == "CANCELED"
        ]
        if not active:
            commands = self.next_command(agent, sweep)
        return {"agent": self.agent(agent), "commands": json.dumps(commands)}

    def next_command(self, agent: Agent, sweep: Sweep) -> list[Json]:
        """What an idle agent does next: at most one command."""
        if sweep.state == "PAUSED":
            return []
        if sweep.state in ("FINISHED", "CANCELED"):
            return [{"type": "exit"}]
        sweep.state = "RUNNING"
        if sweep.requeued:
            run = sweep.requeued.pop(0)
            command = "resume"
            # The whole config comes back, what the client put into it as well.
            arguments = {
                **run.sweep_arguments,
                "_wandb": run.raw_config.get("_wandb", {"value": {}}),
            }
        else:
            parameters = sweep.next_parameters()
            if parameters is None:
                sweep.state = "FINISHED"
                return [{"type": "exit"}]
            command = "run"
            arguments = {name: {"value": value} for name, value in parameters.items()}
            run = Run(sweep.entity, sweep.project, new_id(), sweep=sweep.id, state="pending")
            run.raw_config, run.sweep_arguments = dict(arguments), arguments
            run.display_name = f"sweep-{len(sweep.runs) + 1}"
            self.state.runs[run.key] = run
            sweep.runs.append(run)
        agent.runs.append(run)
        program = sweep.config.get("program")
        return [{"type": command, "run_id": run.id, "args": arguments, "program": program}]

    def requeue(self, run: Run) -> None:
        """A preempted run of a sweep is handed out again, before new points."""
        sweep = self.state.sweeps.get((run.entity, run.project, run.sweep or ""))
        if run.state == "preempted" and sweep is not None and run not in sweep.requeued:
            sweep.requeued.append(run)
            if sweep.state == "FINISHED":
                sweep.state = "RUNNING"
