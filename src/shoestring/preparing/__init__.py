"""The jobs of ``shoestring data``: readers, codecs and encoders brought together with the store."""
