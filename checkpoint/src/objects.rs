//! Objects of a run that are no checkpoints: what its coordinators keep beside them.

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::{PutMode, path::Path};

use crate::store::{Store, StoreError};

impl Store {
    /// The names in a folder that come after the name `after` (which need not be there), ascending,
    /// without the folder's own.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn names_after(&self, folder: &str, after: &str) -> Result<Vec<String>, StoreError> {
        let prefix = self.path(folder);
        let listed = if after.is_empty() {
            self.objects().list(Some(&prefix))
        } else {
            self.objects().list_with_offset(Some(&prefix), &self.path(&format!("{folder}/{after}")))
        };
        let listed: Vec<_> = listed
            .map_ok(|object| object.location)
            .try_collect()
            .await
            .map_err(|cause| self.error("list", folder, cause))?;
        let name = |path: &Path| -> Option<String> {
            let parts: Vec<_> =
                path.prefix_match(&prefix)?.map(|p| p.as_ref().to_owned()).collect();
            Some(parts.join("/"))
        };
        let mut names: Vec<_> = listed.iter().filter_map(name).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Writes an object, whatever is there: for objects that one writer owns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn replace(&self, name: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.put(name, bytes, PutMode::Overwrite).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_come_in_order_and_after_the_one_that_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        for name in ["log/0003", "log/0001", "log/0002.beat", "log/0002", "lot/0004"] {
            store.replace(name, Bytes::from_static(b"x")).await.unwrap();
        }
        let names = |after| store.names_after("log", after);
        assert_eq!(names("").await.unwrap(), ["0001", "0002", "0002.beat", "0003"]);
        assert_eq!(names("0002").await.unwrap(), ["0002.beat", "0003"]);
        assert_eq!(store.names_after("nothing", "").await.unwrap(), Vec::<String>::new());
    }
}
