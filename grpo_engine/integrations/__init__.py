"""The ops and the rollout inside other people's programs. Each module needs the library that it is named after."""
