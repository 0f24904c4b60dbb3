"""Small diffusion pipelines under the short name that scripts outside of this repository import.

They run from the root of the repository with `tests` on the path: `import tiny` must keep working.
"""

from models.diffusion import *  # noqa: F403
