"""Tables: what a schema says of each column, and how rows become tensors.

columns        kinds of columns: how a cell is read
schema         all that is public about a table, as a JSON file
proposing      a schema from names and types of columns
files          CSV and Parquet as chunks of cells
rows           rows in memory as a chunk of cells
encoding       chunks -> numbers, with every fault of a file in one message
preprocessing  numbers -> features: a module that is saved and exported with the model
"""

from dptorch.tables.encoding import Encoded, encode
from dptorch.tables.files import open_table
from dptorch.tables.preprocessing import Preprocessing
from dptorch.tables.proposing import propose
from dptorch.tables.rows import chunk_of
from dptorch.tables.schema import Label, Schema, Unit

__all__ = [
    "Encoded",
    "Label",
    "Preprocessing",
    "Schema",
    "Unit",
    "chunk_of",
    "encode",
    "open_table",
    "propose",
]
