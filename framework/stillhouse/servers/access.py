"""Access to a server for what is bought of it and kept in one folder of a store; and the name of
the model that it serves."""

from stillhouse.cluster.environment import secret_in
from stillhouse.config import ServerSection
from stillhouse.servers.client import BEFORE_A_RUN, Access, Server
from stillhouse.servers.ledger import Ledger
from stillhouse.servers.served import first_in_store
from stillhouse.store.object_store import Blobs


def access_of(section: ServerSection, blobs: Blobs, folder: str, *, table: str) -> Access:
    """With the key that the environment has, within the section's limit of costs. `table`: the
    config's."""
    ledger = Ledger(blobs, folder, limit_usd=section.max_cost_usd, setting=f"{table}.max_cost_usd")
    return Access(secret_in(section.api_key_env), ledger, first_in_store(blobs, folder))


def served_model(section: ServerSection, *, table: str) -> str:
    """The name under which the server has the model: the section's, or else the only one that the
    server lists, for which it is asked."""
    if section.served_model is not None:
        return section.served_model
    access = Access(secret_in(section.api_key_env))
    return Server(section, table=table, access=access, patience=BEFORE_A_RUN).only_model()
