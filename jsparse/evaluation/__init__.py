"""Methods on models: capture, metrics, costs, comparison."""

from jsparse.evaluation.capture import Captured as Captured
from jsparse.evaluation.capture import Profiled as Profiled
from jsparse.evaluation.capture import capture as capture
from jsparse.evaluation.capture import load_captured as load_captured
from jsparse.evaluation.capture import load_profiled as load_profiled
from jsparse.evaluation.capture import profile as profile
from jsparse.evaluation.capture import save_captured as save_captured
from jsparse.evaluation.compare import compare as compare
from jsparse.evaluation.cost import Cost as Cost
from jsparse.evaluation.cost import attend_backward_cost as attend_backward_cost
from jsparse.evaluation.cost import attend_cost as attend_cost
from jsparse.evaluation.cost import count_flops as count_flops
from jsparse.evaluation.cost import plan_cost as plan_cost
from jsparse.evaluation.density import DensityReport as DensityReport
from jsparse.evaluation.density import density_of_layers as density_of_layers
from jsparse.evaluation.density import density_report as density_report
from jsparse.evaluation.density import reporting as reporting
from jsparse.evaluation.metrics import OutputError as OutputError
from jsparse.evaluation.metrics import output_error as output_error
from jsparse.evaluation.metrics import pairs_attended as pairs_attended
from jsparse.evaluation.metrics import recalled_mass as recalled_mass
from jsparse.evaluation.metrics import tile_shares as tile_shares
from jsparse.evaluation.metrics import visible_density as visible_density
