"""Models, data and step functions of the conformance tests; small real models.

``basic`` holds the models of the gradient tests, the other modules whole scripts by
theme (``script.Script``): what real users write, one trap each.
"""

from tests.models.basic import CASES, STEPS, Case, loss_of, mlp, tape_step

__all__ = ["CASES", "STEPS", "Case", "loss_of", "mlp", "tape_step"]
