"""Methods that route tokens to blocks of keys, or to groups."""

from jsparse.routing.biformer import biformer as biformer
from jsparse.routing.flashmoba import flashmoba as flashmoba
