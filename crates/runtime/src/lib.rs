//! MoeRuntimes: where expert weights live, caches and routing modes.
