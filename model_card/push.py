"""`push_to_hub`: pushes a SafeVLM, or what training added to its base, to the Hub as one commit.

New repositories are private unless you say otherwise, and only files that `publication.py` allows are sent. Repeating
an interrupted push continues it: the Hub keeps large files that arrived completely, and they are not sent twice.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from safevlm.adapter_files import ADAPTER_WEIGHTS, LORA_WEIGHTS

from .adapter import adapter_folder
from .publication import Publication, prepare
from .push_errors import explain_push_error
from .weights import INDEX, WEIGHTS

RETRIED = (429, 500, 502, 503, 504)
WAITS = (1, 2, 4, 8, 16)
"""Seconds before each retry, unless the Hub asks for a certain time."""


@dataclass(frozen=True)
class CommitOptions:
    """
    How a push becomes a commit.

    Args:
        revision (`str`, *optional*): Branch; created if it does not exist. By default `main`.
        create_pr (`bool`): Open a pull request on an existing repository.
        message (`str`, *optional*): The commit's message.
        token (`str`, *optional*): Token for the Hub; by default the one from `hf auth login` or `HF_TOKEN`.
    """

    revision: str | None = None
    create_pr: bool = False
    message: str | None = None
    token: str | None = None


@dataclass
class Push:
    """
    What a push sent, or a dry run would send.

    Args:
        repo_id (`str`)
        files (`dict[str, int]`): Path in the repository -> size in bytes.
        left_out (`list[str]`): Files of the folder that are not sent.
        url (`str`, *optional*): The commit or pull request, or the commit that already has all of this; `None` for a
            dry run.
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
    adapter_only: bool = False,
    max_shard_size: str | int = "5GB",
    commit: CommitOptions = CommitOptions(),
) -> Push:
    """
    Pushes weights, configuration, processor, policy, remote code, card and plots in one commit.

    Args:
        folder_or_model: Folder of a saved SafeVLM or of an adapter, or a model in memory.
        repo_id (`str`): `NAMESPACE/NAME`, or `NAME` in the token's own namespace.
        processor (*optional*): The processor of a model in memory.
        public (`bool`): Whether a new repository is public. Also required to push to an existing public one.
        dry_run (`bool`): Choose and check the files, but send nothing.
        adapter_only (`bool`): Push only what training added to the base: the safety modules and, for OUT/model of
            `safevlm train --output OUT`, the LoRA weights of the last stage. Refused if more than that was trained.
        max_shard_size (`str` or `int`): Largest weight file, such as `"5GB"`; larger ones are split.
        commit (`CommitOptions`): Branch, pull request, message and token.

    Raises:
        `ValueError`: This is not a model, or it holds what must not be published.
        `OSError`: The Hub refuses or cannot be reached. One line that says what to do.
    """
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="safevlm-push-") as scratch:
        scratch = Path(scratch)
        folder = _saved_folder(folder_or_model, processor, scratch)
        if adapter_only:
            folder = adapter_folder(folder, scratch)
        (scratch / "shards").mkdir()
        publication = prepare(folder, repo_id, max_shard_size, scratch / "shards")
        push = Push(repo_id, publication.sizes(), publication.left_out)
        if not dry_run:
            try:
                push.url, push.changed = _upload(publication, repo_id, public, commit)
            except Exception as error:
                raise explain_push_error(error, repo_id, commit.revision) from error
    return push


def _saved_folder(folder_or_model, processor, scratch: Path) -> Path:
    if isinstance(folder_or_model, (str, os.PathLike)):
        folder = Path(folder_or_model)
        if not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is not a folder; name the folder of a saved model.")
        return folder
    if processor is None:
        raise ValueError("To push a model in memory, pass its `processor` as well: nobody could use it without.")
    folder = scratch / "model"
    folder_or_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _upload(publication: Publication, repo_id: str, public: bool, commit: CommitOptions) -> tuple[str, bool]:
    """The URL of the commit or pull request, and whether it is new."""
    api, revision = HfApi(token=commit.token), commit.revision
    if not commit.create_pr:
        repo_id = _retried(lambda: api.create_repo(repo_id, private=not public, exist_ok=True)).repo_id
    remote = _retried(lambda: api.repo_info(repo_id))
    if not commit.create_pr and remote.private == public:
        current, fix = ("private", "leave out --public") if public else ("public", "pass --public")
        raise ValueError(
            f"{repo_id} exists and is {current}; {fix} to push to it as it is, or change that in its settings on the "
            f"Hub first. Nothing was pushed."
        )
    if revision is not None and not revision.startswith("refs/") and not commit.create_pr:
        _retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    if revision is not None:
        remote = _retried(lambda: api.repo_info(repo_id, revision=revision))
    operations = [CommitOperationAdd(name, source) for name, source in publication.files.items()]
    operations += [CommitOperationDelete(name) for name in _stale_weights(remote, publication)]
    info = _retried(
        lambda: api.create_commit(
            repo_id,
            operations,
            commit_message=commit.message or "Upload SafeVLM",
            revision=revision,
            create_pr=commit.create_pr,
        ),
        # After other errors the Hub may have opened the pull request already.
        statuses=(429, 503) if commit.create_pr else RETRIED,
    )
    # If nothing is new, huggingface_hub creates no commit or pull request and returns the last commit.
    return str(info.pr_url or info.commit_url), info.oid != remote.sha


def _stale_weights(remote, publication: Publication) -> list[str]:
    """Weight files of an earlier push. They would be loaded instead of the new ones: a whole file precedes shards."""
    names = [sibling.rfilename for sibling in remote.siblings or ()]
    weights = [name for name in names if fnmatch(name, WEIGHTS) or name in (INDEX, ADAPTER_WEIGHTS, LORA_WEIGHTS)]
    return [name for name in weights if name not in publication.files]


def _retried(call, statuses: tuple[int, ...] = RETRIED):
    """`call()`, repeated while the Hub is busy. huggingface_hub itself only retries the transfer of files."""
    for wait in (*WAITS, None):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in statuses or wait is None:
                raise
            retry_after = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(retry_after), 300) if retry_after.isdigit() else wait)
