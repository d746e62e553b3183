"""The only package that imports ray.

Ray reads its settings from the environment when it is imported, so all of them are set here, before any module of this
package imports it. A value that the user has set is left alone.
"""

import os

_SETTINGS = {
    # Ray Train's second version: its errors name the workers, and it knows preemption.
    "RAY_TRAIN_V2_ENABLED": "1",
    # Sources are named relative to where the driver runs, not to Ray Train's own folder.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Its controller runs in the driver, whose logging stays as it is.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # A dead worker is noticed, and a node's notice read, within a second.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # A task without GPUs leaves CUDA_VISIBLE_DEVICES as it is.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Tune writes nothing of its own, leaves Ctrl-C to the driver, and prints nothing: the ledger and the display are ours.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output announces itself at any `verbose`
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
