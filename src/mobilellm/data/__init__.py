"""From text to batches: documents, shards on disk, and a loader that can stop and go on. numpy only."""
