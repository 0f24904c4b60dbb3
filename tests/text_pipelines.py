"""Small pipelines for every text encoder under the short name that scripts outside of this repository import.

They run from the root of the repository with `tests` on the path: `import text_pipelines` must keep working.
"""

from models.text_encoders import *  # noqa: F403
