"""How the embedded checkpoint was made: training, measurement and ablation. Not in the wheel."""
