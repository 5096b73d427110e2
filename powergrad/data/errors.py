"""What can be wrong with a data set.

DataError
├── DataMissing      it is not where it was looked for, or there is too little of it
└── DataUnreadable   a file of it cannot be read, or is refused
"""

from __future__ import annotations


class DataError(Exception):
    """Base of all data set errors. The message names the place and the way out."""


class DataMissing(DataError):
    """The data set, a split or a class of it is not there."""


class DataUnreadable(DataError):
    """A file of the data set is broken, of an unknown kind, or over a limit."""
