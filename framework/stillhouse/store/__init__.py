"""The shared store: recipes say what a target is of, chunks hold the targets, and only whole, verified chunks are ever seen."""

from stillhouse.errors import StoreUnavailable as StoreUnavailable
from stillhouse.store.chunk import Chunk as Chunk
from stillhouse.store.chunk import pack_chunk as pack_chunk
from stillhouse.store.chunk import unpack_chunk as unpack_chunk
from stillhouse.store.chunks import ChunkMissing as ChunkMissing
from stillhouse.store.chunks import ChunkRef as ChunkRef
from stillhouse.store.chunks import ChunkStore as ChunkStore
from stillhouse.store.chunks import Finding as Finding
from stillhouse.store.chunks import StoredRecipe as StoredRecipe
from stillhouse.store.chunks import Swept as Swept
from stillhouse.store.chunks import list_recipes as list_recipes
from stillhouse.store.chunks import sweep as sweep
from stillhouse.store.chunks import verify_store as verify_store
from stillhouse.store.explain import StoreForbidden as StoreForbidden
from stillhouse.store.readers import Reader as Reader
from stillhouse.store.readers import Registered as Registered
from stillhouse.store.recipe import Recipe as Recipe
from stillhouse.store.recipe import differences as differences
from stillhouse.store.recipe import nearest as nearest
from stillhouse.store.recipe import parse_recipe as parse_recipe
