"""What a failed request to a store means: whether another try may mend it, and what the user can
do.

An object store's answer is judged by its HTTP status and error code, which obstore quotes before
its debug dump; a local file system's by the system's error number. Words are looked at only where
neither is given.
"""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from stillhouse.errors import StoreError, StoreUnavailable

# what a failed request raises, of obstore's or of the system's
FAILURES = (BaseError, OSError, ValueError)


class StoreForbidden(StoreError):
    """The store refuses it: these credentials, or this user, may only read, or not even that."""


class NotAFileError(StoreError):
    """Something else is in the place of an object in a directory: a named pipe, a device, a
    directory, a link to nothing."""


class Meaning(NamedTuple):
    """What an answer means."""

    kind: type[StoreError]  # StoreUnavailable where another try may help
    advice: str


_BUSY = Meaning(
    StoreUnavailable,
    "it cannot be reached, or is too busy: check the network and, where one is set, the endpoint",
)
_CUT = Meaning(StoreUnavailable, "what was sent or received is not whole: try again")
_REPLACED = Meaning(StoreUnavailable, "it was replaced while it was read: read it again")
_FULL = Meaning(StoreUnavailable, "the disk is full, or the quota spent: free some space")
_RIGHTS = Meaning(
    StoreForbidden,
    "permission denied: check the credentials and their rights to list, read, create and delete "
    "here",
)
_EXPIRED = Meaning(
    StoreError,
    "the credentials have expired: renew them on every machine that uses the store, then run again",
)
_INVALID = Meaning(
    StoreError,
    "the credentials are not valid here: check key, secret and session token, and that all three "
    "are of one account",
)
_CLOCK = Meaning(
    StoreError,
    "this machine's clock is wrong, so the store refuses what it signs: set the clock, for "
    "example by NTP",
)
_NO_BUCKET = Meaning(
    StoreError, "there is no such bucket: create it, or correct the name in store.url"
)
_ELSEWHERE = Meaning(StoreError, "the bucket is elsewhere: set AWS_REGION to its region")
_NO_CREDENTIALS = Meaning(
    StoreError,
    "no credentials were found: set those of the store's provider in the environment, such as "
    "AWS_ACCESS_KEY_ID",
)
_TOO_LARGE = Meaning(
    StoreError,
    "the store takes no object of this size: raise its limit, or that of the proxy before it",
)
_UNKNOWN_REQUEST = Meaning(
    StoreError,
    "the store does not know this request: it, or a proxy before it, does not speak enough of its "
    "protocol",
)
_NO_RANGES = Meaning(
    StoreError,
    "it does not answer requests for a range of bytes, which reading needs: use another store or "
    "proxy",
)
_REFUSED = Meaning(
    StoreError,
    "the store refuses the request as it stands: check store.url, the endpoint, the region, and "
    "that no credentials have expired",
)
_NO_PLACE = Meaning(StoreError, "no directory can be made there: choose another place")
_IN_ITS_PLACE = "something else is in its place, or in that of a directory above it: move it away"
_TOO_LONG = Meaning(
    StoreError, "a name in the path, or the path itself, is too long here: choose shorter names"
)
_ODD = Meaning(StoreError, "check store.url, and what its provider wants in the environment")

_CODES: Mapping[Meaning, str] = {
    _EXPIRED: "ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired",
    _INVALID: "InvalidToken InvalidAccessKeyId InvalidClientTokenId SignatureDoesNotMatch "
    "InvalidSecurity AuthenticationFailed InvalidAuthenticationInfo",
    _RIGHTS: "AccessDenied AllAccessDisabled AuthorizationFailure",
    _CLOCK: "RequestTimeTooSkewed RequestInTheFuture",
    _NO_BUCKET: "NoSuchBucket ContainerNotFound FilesystemNotFound InvalidBucketName",
    _ELSEWHERE: "AuthorizationHeaderMalformed PermanentRedirect TemporaryRedirect "
    "IllegalLocationConstraintException",
    _TOO_LARGE: "EntityTooLarge RequestBodyTooLarge",
    _UNKNOWN_REQUEST: "NotImplemented MethodNotAllowed",
    _FULL: "QuotaExceeded XMinioStorageFull InsufficientStorage",
    _BUSY: "SlowDown ServiceUnavailable InternalError ServerBusy OperationTimedOut RequestTimeout "
    "Throttling ThrottlingException TooManyRequests RequestLimitExceeded OperationAborted "
    "ConditionalRequestConflict NoSuchUpload",
    _CUT: "IncompleteBody BadDigest XAmzContentSHA256Mismatch Md5Mismatch",
}
_STATUSES: Mapping[Meaning, tuple[int, ...]] = {
    _ELSEWHERE: (301, 302, 307, 308),
    _INVALID: (401,),
    _RIGHTS: (403,),
    _NO_BUCKET: (404,),
    _UNKNOWN_REQUEST: (405, 501, 505),
    _BUSY: (408, 409, 425, 429),
    _REPLACED: (412, 416),
    _TOO_LARGE: (413,),
    _FULL: (507,),
}
_BY_CODE = {code: meaning for meaning, codes in _CODES.items() for code in codes.split()}
_BY_STATUS = {status: meaning for meaning, those in _STATUSES.items() for status in those}

# of obstore, where it had no answer, or one that it did not accept
_BY_WORDS: Mapping[str, Meaning] = {
    "redirect without LOCATION": _ELSEWHERE,
    "non-partial response when range requested": _NO_RANGES,
    "HTTP error: ": _BUSY,
    "Requested ": _CUT,  # "Requested 0..6000, got 0..100"
    "credential": _NO_CREDENTIALS,
}

_BY_SYSTEM_ERROR: Mapping[int, Meaning] = {
    **dict.fromkeys((errno.EPERM, errno.EACCES, errno.EROFS), _RIGHTS),
    **dict.fromkeys((errno.EFBIG, errno.ENOSPC, errno.EDQUOT), _FULL),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR), Meaning(StoreError, _IN_ITS_PLACE)),
    errno.EEXIST: Meaning(NotAFileError, _IN_ITS_PLACE),
    errno.ENOENT: _NO_PLACE,
    errno.ENAMETOOLONG: _TOO_LONG,
}

_DEBUG_DUMP = "\n\nDebug source:"
_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})\b")
_CODE = re.compile(r"<Code>\s*([\w.]+)\s*</Code>|\(code: ([\w.]+)\)")
_BODY = re.compile(r"<\?xml|<Error")
_SYSTEM_ERROR = re.compile(r"os error (\d+)\)")
_METADATA_SERVICE = re.compile(r"169\.254\.169\.254|metadata\.google")


@contextmanager
def explained(doing: str, *, url: str, absence_passes: bool = True) -> Iterator[None]:
    """Raise a failure in the block as `explain` words it; an absent object stays a
    FileNotFoundError where `absence_passes`."""
    try:
        yield
    except FAILURES as error:
        if absence_passes and says_absent(error):
            raise
        raise explain(error, doing=doing, url=url) from error


def explain(error: Exception, *, doing: str, url: str) -> StoreError:
    """A library's or the system's error as one that says what to do."""
    said = _said(error)
    meaning = _meaning(error, said)
    return meaning.kind(f"cannot {doing} in {url}: {meaning.advice} ({_in_short(said)})")


def meaning_of(status: int, code: str) -> Meaning:
    """What an object store means by an answer that is no success; `code` is '' where it gives none.
    An unknown code is judged by its status."""
    return _BY_CODE.get(code) or _BY_STATUS.get(status) or (_BUSY if status >= 500 else _REFUSED)


def says_absent(error: Exception) -> bool:
    """Whether an error says that there is no such object, and no more than that: the bucket is
    there."""
    return isinstance(error, FileNotFoundError) and _code_in(_said(error)) not in _BY_CODE


def is_past_the_end(error: Exception) -> bool:
    """Whether an error says that a range begins after the object's end."""
    said = _said(error)
    return "range was invalid" in said or _status_in(said) == 416


def _meaning(error: Exception, said: str) -> Meaning:
    """From the surest evidence to the least sure: the metadata service's name, an answer, the kind
    of the error, a system error, words."""
    if _METADATA_SERVICE.search(said):
        return _NO_CREDENTIALS
    status, code = _status_in(said), _code_in(said)
    if status is not None or code:
        return meaning_of(status or 500, code)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return _RIGHTS
    if isinstance(error, PreconditionError):
        return _REPLACED
    number = _SYSTEM_ERROR.search(said)
    if number is not None:
        return _BY_SYSTEM_ERROR.get(int(number[1]), _ODD)
    return next((meaning for words, meaning in _BY_WORDS.items() if words in said), _ODD)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror} (os error {error.errno})"  # as obstore words it
    return str(error).split(_DEBUG_DUMP)[0]


def _status_in(said: str) -> int | None:
    match = _STATUS.search(said)
    return int(match[1]) if match else None


def _code_in(said: str) -> str:
    match = _CODE.search(said)
    return match[1] or match[2] if match else ""


def _in_short(said: str) -> str:
    """The first line, with the code of an answer instead of its body, which may name keys."""
    line = (said.strip().splitlines() or ["no detail"])[0]
    return f"{_BODY.split(line)[0][:300]}{_code_in(said)}"
