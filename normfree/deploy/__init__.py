"""Trained networks in the form that deployment needs: folded, exported, quantized."""
