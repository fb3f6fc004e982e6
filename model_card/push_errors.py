"""Errors of the Hub and the network in one line: what happened, and what to do about it."""

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def explain_push_error(error: Exception, repo_id: str, revision: str | None) -> Exception:
    """An `OSError` whose message helps; an error that is not about the Hub comes back unchanged."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # huggingface_hub's "Error while uploading"
        error = error.__cause__
    hub = constants.ENDPOINT
    again = "repeat the command, and it goes on with what is missing"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return OSError(f"HF_HUB_OFFLINE is set: unset it to push to {hub}.")
    if status == 401:
        return OSError(
            f"{hub} does not accept the token (401): log in with `hf auth login`, or set HF_TOKEN to a token with "
            f"write access from {hub}/settings/tokens."
        )
    if status == 403:
        return OSError(
            f"the token may not write to {repo_id} (403): use one with write access to this namespace, or propose the "
            f"files with --create-pr."
        )
    if isinstance(error, RevisionNotFoundError):
        return OSError(f"{repo_id} has no revision {revision!r}: name a branch, or leave out --revision.")
    if isinstance(error, RepositoryNotFoundError):
        return OSError(
            f"{repo_id} does not exist on {hub}, or the token cannot see it (404): check the name; leave out "
            f"--create-pr to create the repository."
        )
    if status == 429:
        return OSError(f"you have sent too many requests to {hub} (429): wait a few minutes, then {again}.")
    if status is not None and status >= 500:
        return OSError(f"{hub} is in trouble ({status}): {again} later.")
    if isinstance(error, HfHubHTTPError):
        return OSError(f"{hub} refused the push ({status}): {error.server_message or error}")
    if isinstance(error, HTTPError):  # no reply at all
        return OSError(f"the connection to {hub} broke ({error}): {again}.")
    return error
