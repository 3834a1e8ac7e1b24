"""Tables, curves and pictures of runs. This room reads run directories only and never imports torch."""
