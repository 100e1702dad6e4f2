"""The shared store: a recipe decides the targets, chunks hold them, and a reader gets only whole,
verified chunks."""

from stillhouse.errors import StoreUnavailable as StoreUnavailable
from stillhouse.store.chunk import Chunk as Chunk
from stillhouse.store.chunk import pack_chunk as pack_chunk
from stillhouse.store.chunk import unpack_chunk as unpack_chunk
from stillhouse.store.chunk_store import ChunkRef as ChunkRef
from stillhouse.store.chunk_store import ChunkStore as ChunkStore
from stillhouse.store.consumers import Consumer as Consumer
from stillhouse.store.consumers import Registered as Registered
from stillhouse.store.explain import StoreForbidden as StoreForbidden
from stillhouse.store.finding import Finding as Finding
from stillhouse.store.maintenance import StoredRecipe as StoredRecipe
from stillhouse.store.maintenance import Swept as Swept
from stillhouse.store.maintenance import list_recipes as list_recipes
from stillhouse.store.maintenance import sweep as sweep
from stillhouse.store.maintenance import verify_chunks as verify_chunks
from stillhouse.store.maintenance import verify_store as verify_store
from stillhouse.store.numbered import ChunkMissing as ChunkMissing
from stillhouse.store.recipe import Recipe as Recipe
from stillhouse.store.recipe import differences as differences
from stillhouse.store.recipe import nearest as nearest
from stillhouse.store.recipe import parse_recipe as parse_recipe
