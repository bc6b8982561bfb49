"""Safety: the prompt gate, the frame scan, the invisible mark and provenance."""
