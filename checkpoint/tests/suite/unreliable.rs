//! A store in memory whose conditional puts can go wrong as those of a real one do.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    memory::InMemory, path::Path,
};

/// What happens to a conditional put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mishap {
    /// The connection breaks, and nothing was written.
    BreakBefore,
    /// The connection breaks after the object was written.
    BreakAfter,
    /// The object is written, the answer is lost, and the retry finds it there.
    ExistsAfter,
}

#[derive(Debug, Default)]
pub(crate) struct Unreliable {
    objects: InMemory,
    next: Mutex<Option<Mishap>>,
}

impl Unreliable {
    pub(crate) fn spoil_next_create(&self, mishap: Mishap) {
        *self.next.lock().unwrap() = Some(mishap);
    }
}

fn broken() -> Error {
    Error::Generic { store: "Unreliable", source: "connection reset".into() }
}

impl fmt::Display for Unreliable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Unreliable")
    }
}

#[async_trait]
impl ObjectStore for Unreliable {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let mishap = if options.mode == PutMode::Create {
            self.next.lock().unwrap_or_else(PoisonError::into_inner).take()
        } else {
            None
        };
        let put = || self.objects.put_opts(location, payload.clone(), options.clone());
        match mishap {
            None => put().await,
            Some(Mishap::BreakBefore) => Err(broken()),
            Some(Mishap::BreakAfter) => put().await.and(Err(broken())),
            Some(Mishap::ExistsAfter) => {
                put().await?;
                put().await
            }
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.objects.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.objects.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.objects.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.objects.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.objects.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.objects.copy_opts(from, to, options).await
    }
}
