"""The executors: which are there, which is least loaded, and requests on their streams."""

from preprocess_service.executor_client.pool import ExecutorPool
from preprocess_service.executor_client.request import Completed, RemoteRequest, TokenOutput

__all__ = ["Completed", "ExecutorPool", "RemoteRequest", "TokenOutput"]
