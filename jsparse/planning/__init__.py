"""Offline searches over the heads of a model, and the tables that they save."""

from jsparse.planning.influence import influence_of_blocks as influence_of_blocks
from jsparse.planning.pareto import Program as Program
from jsparse.planning.pareto import pareto_front as pareto_front
from jsparse.planning.patterns import kept_mass as kept_mass
from jsparse.planning.patterns import near_outputs as near_outputs
from jsparse.planning.patterns import search_patterns as search_patterns
from jsparse.planning.rules import Lengths as Lengths
from jsparse.planning.rules import elastic_rules as elastic_rules
from jsparse.planning.rules import search_rules as search_rules
from jsparse.planning.scale_factors import search_scale_factors as search_scale_factors
from jsparse.planning.table import Choice as Choice
from jsparse.planning.table import Provenance as Provenance
from jsparse.planning.table import Table as Table
from jsparse.planning.table import load_table as load_table
from jsparse.planning.table import methods_of as methods_of
from jsparse.planning.table import save_table as save_table
from jsparse.planning.thresholds import search_thresholds as search_thresholds

# what finds a table for a method
SEARCHES = {
    "minference": search_patterns,
    "moa": search_rules,
    "xattention": search_thresholds,
    "blasst": search_scale_factors,
}
