//! The gRPC face: the service `percheron.v1.Inference`, on the same port.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    middleware::{self, Next},
    response::Response,
};
use proto::v1::{
    self, ClassifyRequest, ClassifyResponse, PhaseSeconds,
    inference_server::{Inference, InferenceServer},
};
use tonic::Status;

use super::{
    desk::{Answer, Desk, Guess, Place},
    refusal::{Kind, Refusal},
};

/// Of a message beside its image.
const ENVELOPE_BYTES_MAX: usize = 4 << 10;

#[derive(Debug)]
struct Service(Arc<Desk>);

pub(super) fn router(desk: Arc<Desk>) -> Router {
    let most = desk.about().image_bytes_max + ENVELOPE_BYTES_MAX;
    let service = InferenceServer::new(Service(Arc::clone(&desk))).max_decoding_message_size(most);
    let name = <InferenceServer<Service> as tonic::server::NamedService>::NAME;
    Router::new()
        .route_service(&format!("/{name}/{{*method}}"), service)
        .layer(middleware::from_fn_with_state(desk, admitted))
}

/// Gives a call its place before its message is read, and an end to its time.
async fn admitted(State(desk): State<Arc<Desk>>, mut request: Request, next: Next) -> Response {
    let refused = |refusal: &Refusal| {
        desk.figures().answered("grpc", refusal.kind().name());
        status(refusal).into_http()
    };
    match desk.place() {
        Ok(place) => request.extensions_mut().insert(place),
        Err(refusal) => return refused(&refusal),
    };
    let answered = tokio::time::timeout(desk.patience(), next.run(request)).await;
    answered.unwrap_or_else(|_| refused(&Refusal::Late(desk.patience())))
}

#[tonic::async_trait]
impl Inference for Service {
    async fn classify(
        &self,
        request: tonic::Request<ClassifyRequest>,
    ) -> Result<tonic::Response<ClassifyResponse>, Status> {
        let desk = &self.0;
        let place = request.extensions().get::<Place>().expect("each call has a place").clone();
        let ClassifyRequest { image, budget, top } = request.into_inner();
        let answered = match desk.wanted(budget, top) {
            Ok(wanted) => desk.ask(place, image, wanted).await,
            Err(refusal) => Err(refusal),
        };
        let outcome =
            answered.as_ref().map_or_else(|refusal| refusal.kind().name(), |_| "answered");
        desk.figures().answered("grpc", outcome);
        match answered {
            Ok(answer) => Ok(tonic::Response::new(to_wire(answer))),
            Err(refusal) => Err(status(&refusal)),
        }
    }
}

fn status(refusal: &Refusal) -> Status {
    let line = refusal.line();
    match refusal.kind() {
        Kind::BadInput => Status::invalid_argument(line),
        Kind::TooLarge => Status::resource_exhausted(line),
        Kind::Busy => Status::unavailable(line),
        Kind::Late => Status::deadline_exceeded(line),
        Kind::Failed => Status::internal(line),
    }
}

fn to_wire(answer: Answer) -> ClassifyResponse {
    let Answer { exit, confidence, top, budget, macs, macs_share, batch, seconds } = answer;
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let guess = |Guess { class, index, probability }: Guess| v1::Guess {
        class,
        index: count(index),
        probability,
    };
    let super::desk::Seconds { decode, wait, network } = seconds;
    ClassifyResponse {
        exit: exit.to_owned(),
        confidence,
        top: top.into_iter().map(guess).collect(),
        budget,
        macs,
        macs_share,
        batch: count(batch),
        seconds: Some(PhaseSeconds { decode, wait, network }),
    }
}
