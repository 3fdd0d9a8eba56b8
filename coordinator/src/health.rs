//! What a cluster's supervisor asks of this process: is it well, and does it lead. By gRPC's own protocol of
//! health checks, on a port of its own: in plain text and without a token, because kubelets have neither
//! certificates nor secrets, and nothing else is said there.

use proto::v1::cluster_service_server::SERVICE_NAME;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Error, Server};
use tonic_health::{ServingStatus, server::HealthReporter};

/// Answers until it is dropped.
///
/// The service with the empty name is served for as long as the process is; `percheron.v1.ClusterService`
/// only while this coordinator leads. So who stands by is well, and no leader.
#[derive(Debug)]
pub struct Health {
    reporter: HealthReporter,
    _end: oneshot::Sender<()>,
    _server: JoinHandle<Result<(), Error>>,
}

impl Health {
    /// Starts to answer on `listener`: this process is well and does not lead.
    pub async fn serve(listener: TcpListener) -> Self {
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter.set_service_status(SERVICE_NAME, ServingStatus::NotServing).await;
        let (end, ended) = oneshot::channel::<()>();
        let server = Server::builder().add_service(service).serve_with_incoming_shutdown(
            TcpListenerStream::new(listener),
            async {
                drop(ended.await); // Nothing is ever sent.
            },
        );
        Self { reporter, _end: end, _server: tokio::spawn(server) }
    }

    /// Says from now on whether this coordinator leads.
    pub async fn leads(&self, leads: bool) {
        let status = if leads { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status(SERVICE_NAME, status).await;
    }
}

#[cfg(test)]
mod tests {
    use tonic::transport::Endpoint;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;

    #[tokio::test]
    async fn who_stands_by_is_well_and_who_leads_says_so() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let health = Health::serve(listener).await;
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let mut client = HealthClient::new(endpoint.connect().await.unwrap());
        let mut ask = async |service: &str| {
            let request = HealthCheckRequest { service: service.to_owned() };
            client.check(request).await.unwrap().into_inner().status()
        };
        use tonic_health::pb::health_check_response::ServingStatus::{NotServing, Serving};
        assert_eq!((ask("").await, ask(SERVICE_NAME).await), (Serving, NotServing));
        health.leads(true).await;
        assert_eq!((ask("").await, ask(SERVICE_NAME).await), (Serving, Serving));
        health.leads(false).await;
        assert_eq!((ask("").await, ask(SERVICE_NAME).await), (Serving, NotServing));
    }
}
