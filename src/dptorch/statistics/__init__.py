"""Private means, deviations, quantiles and histograms of a data set (docs/statistics.md).

quantities     what is asked of each column, and where its answer is in the released vector
contributions  from rows or pictures to what each unit adds to the vector, in whole numbers
releases       one private step on the vector's sum: planned, charged, then noised
summaries      from the noisy sum to numbers that people read, with the noise's size
statement      what the numbers guarantee
tables, pictures
               from files to a release
"""

from dptorch.statistics.pictures import describe_pictures
from dptorch.statistics.quantities import Choice, Numeric
from dptorch.statistics.releases import Statistics, describe, release
from dptorch.statistics.tables import describe_table

__all__ = [
    "Choice",
    "Numeric",
    "Statistics",
    "describe",
    "describe_pictures",
    "describe_table",
    "release",
]
