"""`push_to_hub`: a SafeVLM, or its safety modules alone, as one commit to the Hub.

Private unless asked otherwise; only what `publication.py` lets through. A push that was interrupted goes on where it
stopped: the Hub keeps the large files that arrived whole, and the same files are not sent twice.
"""

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from safevlm.adapter_files import ADAPTER_WEIGHTS, LORA_CONFIG, LORA_WEIGHTS

from .card import is_adapter
from .facts import FACTS_FILE, read_facts
from .publication import Publication, prepare
from .remote_code import read_json
from .weights import INDEX, WEIGHTS, check_weights, extract_safety_modules

RETRIED = (429, 500, 502, 503, 504)
WAITS = (1, 2, 4, 8, 16)
"""Seconds before the next try, unless the Hub names some."""


@dataclass
class Push:
    """
    What a push sent, or a dry run would send.

    Args:
        repo_id (`str`)
        files (`dict[str, int]`): Bytes per file.
        left_out (`list[str]`): Files of the folder that stay.
        url (`str`, *optional*): Of the commit or pull request, or of the commit that has all this already; `None` for
            a dry run.
        changed (`bool`): Whether anything was sent.
    """

    repo_id: str
    files: dict[str, int]
    left_out: list[str]
    url: str | None = None
    changed: bool = False


def push_to_hub(
    folder_or_model,
    repo_id: str,
    processor=None,
    public: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    adapter_only: bool = False,
    max_shard_size: str | int = "5GB",
    message: str | None = None,
    token: str | None = None,
) -> Push:
    """
    Pushes weights, configuration, processor, policy, remote code, card and plots in one commit.

    Args:
        folder_or_model: Folder of a saved SafeVLM, or of a safety adapter; or a model in memory.
        repo_id (`str`): `NAMESPACE/NAME`, or `NAME` in the token's own namespace.
        processor (*optional*): The processor of a model in memory.
        public (`bool`): Whether a new repository is public. An existing public one is pushed to with this only.
        dry_run (`bool`): Choose and check, but send nothing.
        revision (`str`, *optional*): Branch, made if it is not there.
        create_pr (`bool`): Open a pull request on an existing repository.
        adapter_only (`bool`): Push what training added to the base: the safety modules and, of OUT/model that
            `safevlm train --output OUT` wrote, the last stage's LoRA. Refused where that is not all that was trained:
            on the untouched base it would be another model.
        max_shard_size (`str` or `int`): Of weight files.
        message (`str`, *optional*): Of the commit.
        token (`str`, *optional*): Of the Hub; by default the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        `ValueError`: What is to be pushed is no model, or holds what must not be published.
        `OSError`: The Hub refused or cannot be reached; one line that says what to do.
    """
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="safevlm-push-") as scratch:
        scratch = Path(scratch)
        folder = _folder(folder_or_model, processor, scratch)
        if adapter_only:
            folder = _adapter_folder(folder, scratch)
        (scratch / "shards").mkdir()
        publication = prepare(folder, repo_id, max_shard_size, scratch / "shards")
        push = Push(repo_id, publication.sizes(), publication.left_out)
        if not dry_run:
            api = HfApi(token=token)
            try:
                push.url, push.changed = _upload(api, publication, repo_id, public, revision, create_pr, message)
            except Exception as error:
                raise _plain(error, repo_id, revision) from error
    return push


def _folder(folder_or_model, processor, scratch: Path) -> Path:
    if isinstance(folder_or_model, (str, os.PathLike)):
        folder = Path(folder_or_model)
        if not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is no folder.")
        return folder
    if processor is None:
        raise ValueError("A model in memory needs its `processor`, too, or nobody could use it.")
    folder = scratch / "model"
    folder_or_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _adapter_folder(folder: Path, scratch: Path) -> Path:
    """The adapter in `folder`, or one made of the whole model there."""
    if is_adapter(folder):
        return folder
    from safevlm import SafeVlmConfig

    lora = _lora(folder)
    adapter = scratch / folder.resolve().name
    names = sorted(path.name for path in folder.glob(WEIGHTS))
    check_weights(folder, names)
    adapter.mkdir()
    SafeVlmConfig.from_pretrained(folder).save_pretrained(adapter)
    if lora is None:
        extract_safety_modules(folder, names, adapter / ADAPTER_WEIGHTS)
    else:
        (adapter / LORA_CONFIG).parent.mkdir()
        shutil.copy(lora / Path(LORA_WEIGHTS).name, adapter / LORA_WEIGHTS)
        config = read_json(lora / Path(LORA_CONFIG).name)
        config["base_model_name_or_path"] = read_facts(folder)["base_model"]["name"]  # not where it lay here
        (adapter / LORA_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in (FACTS_FILE, "README.md"):
        if (folder / name).is_file():
            shutil.copy(folder / name, adapter / name)
    if (folder / "plots").is_dir():
        shutil.copytree(folder / "plots", adapter / "plots")
    return adapter


def _lora(folder: Path) -> Path | None:
    """
    Where the last stage's LoRA is, safety modules included; `None` if the safety modules are all that was trained.

    Raises:
        `ValueError`: More was trained than can be told apart from the base.
    """
    stages = (read_facts(folder).get("training") or {}).get("stages") or []
    arguments = [stage.get("arguments", {}) for stage in stages]
    also = [i for i, given in enumerate(arguments) if given.get("trainable") != ["safety"]]
    if stages and not also:
        return None
    # Of the last stage's LoRA the base is the one that all started from, and its file has the safety modules, too.
    if also == [len(stages) - 1] and arguments[-1].get("lora_r") and "safety" in arguments[-1]["trainable"]:
        lora = folder.resolve().parent / f"{len(stages)}-{stages[-1]['stage']}" / "adapter"
        if all((lora / Path(name).name).is_file() for name in (LORA_CONFIG, LORA_WEIGHTS)):
            return lora
        why = f"its stage {stages[-1]['stage']!r} trained LoRA, which is not in {str(lora)!r}"
    elif also:
        why = f"its stage {stages[also[0]]['stage']!r} trained more than the safety modules, and not as the last LoRA"
    else:
        why = "nothing says how it was trained"
    raise ValueError(
        f"--adapter-only: the safety modules of {str(folder)!r} cannot go alone, since {why}; on the untouched base "
        f"they would be another model. Push it whole, or push a folder that `save_safety_adapter` wrote, such as that "
        f"of stage 1's model."
    )


def _upload(api: HfApi, publication: Publication, repo_id, public, revision, create_pr, message) -> tuple[str, bool]:
    if create_pr:
        there = _retried(lambda: api.repo_info(repo_id))
    else:
        repo_id = _retried(lambda: api.create_repo(repo_id, private=not public, exist_ok=True)).repo_id
        there = _retried(lambda: api.repo_info(repo_id))
        if there.private == public:
            now, wanted = ("private", "leave out --public") if public else ("public", "pass --public")
            raise ValueError(
                f"{repo_id} exists and is {now}; {wanted} to push to it as it is, or change that in its settings on "
                f"the Hub first. Nothing was pushed."
            )
    if revision is not None and not revision.startswith("refs/") and not create_pr:
        _retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    if revision is not None:
        there = _retried(lambda: api.repo_info(repo_id, revision=revision))
    stale = [
        sibling.rfilename
        for sibling in there.siblings or ()
        if (fnmatch(sibling.rfilename, WEIGHTS) or sibling.rfilename in (INDEX, ADAPTER_WEIGHTS, LORA_WEIGHTS))
        and sibling.rfilename not in publication.files
    ]
    operations = [CommitOperationAdd(name, source) for name, source in publication.files.items()]
    # A former push's weights would be loaded in the place of these: a whole file goes before shards.
    operations += [CommitOperationDelete(name) for name in stale]
    commit = _retried(
        lambda: api.create_commit(
            repo_id,
            operations,
            commit_message=message or "Upload SafeVLM",
            revision=revision,
            create_pr=create_pr,
        ),
        # After another error the Hub may have opened the pull request already.
        statuses=(429, 503) if create_pr else RETRIED,
    )
    # Where nothing is new, huggingface_hub makes no commit or pull request and returns the last commit.
    return str(commit.pr_url or commit.commit_url), commit.oid != there.sha


def _retried(call, statuses: tuple[int, ...] = RETRIED):
    """`call()`, again if the Hub is busy: huggingface_hub itself retries the transfer of files only."""
    for wait in (*WAITS, None):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in statuses or wait is None:
                raise
            named = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(named), 300) if named.isdigit() else wait)


def _plain(error: Exception, repo_id: str, revision: str | None) -> Exception:
    """One line that says what happened and what to do."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # huggingface_hub's "Error while uploading"
        error = error.__cause__
    host = constants.ENDPOINT
    again = "repeat the command, and it goes on with what is missing"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return OSError(f"HF_HUB_OFFLINE is set: unset it to push to {host}.")
    if status == 401:
        return OSError(
            f"{host} does not accept the token (401): log in with `hf auth login`, or set HF_TOKEN to a token with "
            f"write access from {host}/settings/tokens."
        )
    if status == 403:
        return OSError(
            f"the token may not write to {repo_id} (403): use one with write access to this namespace, or propose the "
            f"files with --create-pr."
        )
    if isinstance(error, RevisionNotFoundError):
        return OSError(f"{repo_id} has no revision {revision!r}: name a branch, or leave --revision out.")
    if isinstance(error, RepositoryNotFoundError):
        return OSError(
            f"{repo_id} does not exist on {host}, or the token cannot see it (404): check the name; leave out "
            f"--create-pr to make the repository."
        )
    if status == 429:
        return OSError(f"{host} has too many requests of yours (429): wait some minutes, then {again}.")
    if status is not None and status >= 500:
        return OSError(f"{host} is in trouble ({status}): {again} later.")
    if isinstance(error, HfHubHTTPError):
        return OSError(f"{host} refused the push ({status}): {error.server_message or error}")
    if isinstance(error, HTTPError):  # no answer at all
        return OSError(f"the connection to {host} broke ({error}): {again}.")
    return error
