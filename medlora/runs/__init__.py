"""What is on disk and in a store: folders, atomic files, manifests, locks, mirrors."""
