"""Files that training tools load by name, so that they know layout ``loftq`` (docs/training).

ms-swift puts the folder of such a file first in ``sys.path``: nothing here may bear the name of a
module that is imported from elsewhere.
"""
