"""What quantizing a model does, to be looked at: numbers, pictures, one page of HTML.

    record = sqjax.report.measure(model, params, batches, windows, scheme="W8A8", alpha=0.85)
    Path("report.html").write_text(sqjax.report.html(record))
    print(sqjax.report.inspect(model.apply, params, batches))

May import `calibration`, `folding`, `methods`, `models`, `program`, `weights`, and the small
helpers `sqjax._*`; never `commands`, which are its users.
"""

from sqjax.report.inspection import Inspection as Inspection
from sqjax.report.inspection import inspect as inspect
from sqjax.report.measuring import measure as measure
from sqjax.report.page import html as html
from sqjax.report.record import Record as Record
