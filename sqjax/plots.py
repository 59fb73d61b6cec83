"""Pictures of what quantization meets and does, drawn with matplotlib: the extra `plots`.

Each function takes plain numbers and returns a `matplotlib.figure.Figure` on a transparent ground;
`figure.savefig("name.svg")` writes it. `sqjax.report` gives the numbers of a model.
"""

from sqjax.report.pictures import alphas as alphas
from sqjax.report.pictures import channels as channels
from sqjax.report.pictures import errors as errors
from sqjax.report.pictures import outliers as outliers
from sqjax.report.pictures import surface as surface
from sqjax.report.pictures import tradeoff as tradeoff
