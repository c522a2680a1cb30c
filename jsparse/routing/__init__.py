"""Methods that route tokens to blocks of keys, or to groups."""

from jsparse.routing.biformer import biformer as biformer
from jsparse.routing.flashmoba import flashmoba as flashmoba
from jsparse.routing.routing_transformer import routing_transformer as routing_transformer
