//! Why a request is not answered.

use std::{error::Error, time::Duration};

use shards::ShowError;

/// What is wrong with a request, or with the moment.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("there is no parameter {0}; there are budget and top")]
    Parameter(String),
    #[error("budget={0}: it must be a whole number from 0, cheap, to 32, expensive")]
    Budget(String),
    #[error(
        "budget: this server has no thresholds, because it was started with --no-budgets; leave it out"
    )]
    NoBudgets,
    #[error("top={0}: it must be a whole number from 1")]
    Top(String),
    #[error("there is no image; send the bytes of a JPEG or PNG file")]
    Empty,
    #[error("the image did not arrive whole; send it again")]
    Broken,
    #[error("the image cannot be used; send a whole JPEG or PNG file")]
    Image(#[source] ShowError),
    #[error("the image is too large: at most {most} bytes are taken")]
    TooLarge { most: usize },
    #[error("{most} requests are under way, and no more are taken; ask again later")]
    Full { most: usize },
    #[error("the request took longer than {} s; ask again later", .0.as_secs())]
    Late(Duration),
    #[error("the server ends; ask another")]
    Ending,
    #[error("the network has failed, and the server ends; its last words say why")]
    Failed,
}

/// What kind of refusal it is, for statuses and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    BadInput,
    TooLarge,
    Busy,
    Late,
    Failed,
}

impl Refusal {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Parameter(_)
            | Self::Budget(_)
            | Self::NoBudgets
            | Self::Top(_)
            | Self::Empty
            | Self::Broken
            | Self::Image(_) => Kind::BadInput,
            Self::TooLarge { .. } => Kind::TooLarge,
            Self::Full { .. } | Self::Ending => Kind::Busy,
            Self::Late(_) => Kind::Late,
            Self::Failed => Kind::Failed,
        }
    }

    /// One line: what is wrong, and why.
    pub(super) fn line(&self) -> String {
        let mut line = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            line = format!("{line}: {error}");
            source = error.source();
        }
        line.replace('\n', " ")
    }
}

impl Kind {
    /// As metrics call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::BadInput => "bad_input",
            Self::TooLarge => "too_large",
            Self::Busy => "busy",
            Self::Late => "late",
            Self::Failed => "failed",
        }
    }
}
