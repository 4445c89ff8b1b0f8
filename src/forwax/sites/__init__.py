"""Sites: the places in a traced program where a parameter meets data.

The only package that reads jaxprs.
"""

from forwax.sites.credit import Credit
from forwax.sites.draw import draw_noise, num_coordinates
from forwax.sites.find import find_sites
from forwax.sites.noise import Drawn, Held
from forwax.sites.noise_point import noise_point
from forwax.sites.order import behind
from forwax.sites.program import Variable
from forwax.sites.push import push_drawn
from forwax.sites.replay import replay
from forwax.sites.run import Values
from forwax.sites.sites import Pass, Site, Sites
from forwax.sites.weight_plan import WeightPlan, plan_low_rank, plan_signs

__all__ = [
    "Credit",
    "Drawn",
    "Held",
    "Pass",
    "Site",
    "Sites",
    "Values",
    "Variable",
    "WeightPlan",
    "behind",
    "draw_noise",
    "find_sites",
    "noise_point",
    "num_coordinates",
    "plan_low_rank",
    "plan_signs",
    "push_drawn",
    "replay",
]
