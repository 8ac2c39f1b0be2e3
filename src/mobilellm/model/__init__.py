"""The model in torch: forward pass, cache, generation, and checkpoints of every known layout."""

from mobilellm.installation import install_command, missing_packages

if missing_packages("torch"):
    raise ModuleNotFoundError(
        f"mobilellm.model needs torch; install with: {install_command('torch')}", name="torch"
    )
