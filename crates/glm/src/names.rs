//! Tensor-name layouts of the family, as rules from a stored prefix to the name used here.

use pocketglm_checkpoint::NameRules;

/// The layouts in which checkpoints of the family are found, the most common first.
pub const LAYOUTS: &[NameRules] = &[
    NameRules {
        layout: "transformers",
        prefixes: &[
            ("model.language_model.", "model.language_model."),
            ("model.visual.", "model.visual."),
            ("lm_head.", "lm_head."),
        ],
    },
    NameRules {
        layout: "server",
        prefixes: &[
            ("language_model.model.", "model.language_model."),
            ("visual.", "model.visual."),
            ("language_model.lm_head.", "lm_head."),
        ],
    },
    NameRules {
        layout: "text only",
        prefixes: &[
            ("model.layers.", "model.language_model.layers."),
            ("model.embed_tokens.", "model.language_model.embed_tokens."),
            ("model.norm.", "model.language_model.norm."),
        ],
    },
];
