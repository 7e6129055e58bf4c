"""HTTP: the protocols of OpenAI in front of one loaded model (lavit serve)."""
