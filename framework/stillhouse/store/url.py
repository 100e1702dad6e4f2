"""The URL of a store: which ones there are, and one spelling for each store."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from stillhouse.errors import StoreError

_BUCKET_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
_SCHEMES = (*_BUCKET_SCHEMES, "file", "memory")
_WANTED = "a directory, or s3://, gs:// or az:// with bucket and prefix"


def absolute_url(url: str) -> str:
    """A directory as an absolute path, so that it means the same in every process; any other URL
    without a slash at its end. Raises StoreError on a URL that names no store."""
    if not url:
        raise StoreError(f"the store's URL is empty; set store.url to {_WANTED}")
    if "://" not in url:
        scheme, colon, _ = url.partition(":")
        if colon and scheme.lower() in _SCHEMES:
            raise StoreError(
                f"the store's URL is {url}: wanted {_WANTED}; for a directory that is called so, "
                f"write ./{url}"
            )
        return str(Path(url).absolute())
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise StoreError(
                f"the store's URL is {url}: write file:/// with an absolute path, or the path alone"
            )
        return str(Path(unquote(parts.path)))
    is_memory = parts.scheme == "memory"
    is_bucket = parts.scheme in _BUCKET_SCHEMES and bool(parts.netloc)
    if not (is_memory or is_bucket) or ".." in parts.path.split("/"):
        raise StoreError(f"the store's URL is {url}: wanted {_WANTED}")
    return url if is_memory else url.rstrip("/")
