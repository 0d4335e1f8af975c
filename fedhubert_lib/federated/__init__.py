"""Federated training and clustering over clients that never share audio: one client app, one server app, engines."""
