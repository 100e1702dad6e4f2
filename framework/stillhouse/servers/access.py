"""Access to a server for what is bought of it and kept in one folder of a store."""

from stillhouse.cluster.environment import secret_in
from stillhouse.config import ServerSection
from stillhouse.servers.client import Access
from stillhouse.servers.ledger import Ledger
from stillhouse.servers.served import first_in_store
from stillhouse.store.object_store import Blobs


def access_of(section: ServerSection, blobs: Blobs, folder: str, *, table: str) -> Access:
    """With the key that the environment has, within the section's limit of costs. `table`: the
    config's."""
    ledger = Ledger(blobs, folder, limit_usd=section.max_cost_usd, setting=f"{table}.max_cost_usd")
    return Access(secret_in(section.api_key_env), ledger, first_in_store(blobs, folder))
