"""A model's configuration from the Hub or its cache.

It asks the Hub at most once. transformers, and downloads, would retry for half a minute without a network.
"""

from pathlib import Path


def hub_config(name: str, argument: str, revision: str | None = None) -> Path:
    """
    The `config.json` of a model that is not a local folder.

    Args:
        name (`str`): The Hub id.
        argument (`str`): The argument that named it, for the error.
        revision (`str`, *optional*): Branch, tag or commit.

    Raises:
        `ValueError`: There is no such model, or it cannot be downloaded.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if isinstance(cached := try_to_load_from_cache(name, "config.json", revision=revision), str):
            return Path(cached)
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except HFValidationError:
        reason = "and not a valid name of a model on the Hub"
    except RepositoryNotFoundError:
        reason = "and not a model on the Hub that you may see; check the name, or log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"and has no revision {revision!r} on the Hub; look at its commits"
    except EntryNotFoundError:
        reason = "and on the Hub it has no config.json"
    except HfHubHTTPError as error:
        reason = f"and the Hub refuses it ({str(error).splitlines()[0]})"
    except OfflineModeIsEnabled:
        reason = "and not in the cache of the Hub's models; HF_HUB_OFFLINE keeps the Hub from being asked"
    except (HTTPError, OSError) as error:
        reason = f"and not in the cache of the Hub's models, and the Hub cannot be reached ({error})"
    raise ValueError(f"{argument} {name!r} is not a local folder, {reason}.")
