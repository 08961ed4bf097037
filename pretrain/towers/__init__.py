"""Parts of towers: model classes, pooling, projections, frozen statistics and small towers."""
