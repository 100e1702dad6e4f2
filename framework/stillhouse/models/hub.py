"""The hub, for what is no model that is loaded: the licence that a model's card names, and a
directory that becomes a repository."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token

from stillhouse.errors import ModelError
from stillhouse.model_path import source_of


def licence_of(model: str) -> str | None:
    """The licence that the card of a local directory or of a model on the hub names. None where it
    names none, or where there is no card to be read."""
    source = source_of(model)
    card = Path(source) / "README.md" if Path(source).is_dir() else source
    try:
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except Exception:  # of the HTTP client or of YAML: a card is for people, and decides nothing
        return None
    return licence if isinstance(licence, str) else None


def upload(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Commit the files of a directory to the repository `owner/name`, which is made where it does
    not exist. Returns its address.

    Raises ModelError where no token is there, or the hub refuses the name, the token or the files.
    """
    if get_token() is None:
        raise ModelError(
            f"{name} cannot be pushed without a token; run `hf auth login` or set HF_TOKEN"
        )
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:  # of the HTTP client, which depends on the library's version
        why = str(error).strip() or type(error).__name__
        raise ModelError(
            f"{name} cannot be pushed: {why}; check the name (owner/name), the network, and that "
            "the token may write there"
        ) from error
    return str(address)
